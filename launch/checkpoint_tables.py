"""Tables of `launch.checkpoints`: what a run has saved, and how two checkpoints differ."""

import json
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from launch.progress import byte_bar
from launch.resume_rules import flatten
from launch.run_directory import RunDirectory

SHOWN = 20
"""Tensors of a kind that a comparison prints, those that differ most."""
RELATIVE = "||a - b|| / ||a||"
WIDTH = 140
"""Columns of what goes into a file or a pipe."""


def print_checkpoints(run: RunDirectory) -> None:
    """Print what is in a run's directory of checkpoints, damaged and foreign ones too."""
    table = Table("checkpoint", "trained", "saved", "size", "strategy", "written by", "")
    folders = [*sorted(run.checkpoints.glob("*")), *sorted(run.checkpoints.glob("abandoned/*"))]
    paths = [p for p in folders if p.is_dir() and p.name[0] != "." and p.name != "abandoned"]
    for path in paths:
        cells, is_wrong = _row(run, path)
        table.add_row(*cells, style="red" if is_wrong else None)
    console = _console()
    if paths:
        console.print(table)
    total = decimal(sum(map(_size_of, paths)))
    lines = [f"{len(paths)} checkpoint(s), {total}, in {run.checkpoints}", *leftovers(run)]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def leftovers(run: RunDirectory) -> list[str]:
    """A line for each directory of a save or deletion that was killed, or is under way."""
    return [
        f"{path.name}: a save or deletion that is under way or was killed, "
        f"{decimal(_size_of(path))}; the run's next start removes it"
        for path in sorted(run.checkpoints.glob(".step-*"))
    ]


def read_pointers(run: RunDirectory) -> dict[str, dict[str, Any]]:
    """`last` and `best` of a run that has them: `checkpoint`; of best also `metric` and `value`."""
    from trainers.checkpoint import read_last

    found = {}
    if (last := read_last(run.checkpoints)) is not None:
        found["last"] = {"checkpoint": last}
    if (path := run.checkpoints / "best").exists():
        found["best"] = json.loads(path.read_text())
    return found


def name_in(run: RunDirectory, path: Path) -> str:
    """What a run calls a checkpoint: `step-00000100`, `abandoned/step-00000100`; else its path."""
    folder, path = run.checkpoints.resolve(), path.resolve()
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _row(run: RunDirectory, path: Path) -> tuple[list[str], bool]:
    """Cells of a checkpoint, and whether something is wrong with it."""
    from trainers.checkpoint import MANIFEST
    from trainers.checkpoint_inspection import look_at

    manifest, damage = look_at(path)
    try:
        facts = _facts(run, manifest)
        marks = _marks(run, path, manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        facts, marks = ["", "", ""], []
        damage = damage or f"{MANIFEST} is not of this program ({type(error).__name__}: {error})"
    trained, strategy, version = facts
    file = path / MANIFEST
    time = datetime.fromtimestamp((file if file.exists() else path).stat().st_mtime)
    saved, size = f"{time:%Y-%m-%d %H:%M}", decimal(_size_of(path))
    notes = ", ".join([*marks, *([damage] if damage else [])])
    return [name_in(run, path), trained, saved, size, strategy, version, notes], damage is not None


def _facts(run: RunDirectory, manifest: Mapping[str, Any]) -> list[str]:
    if not manifest:
        return ["", "", ""]
    strategy, ranks = manifest["strategy"], manifest["world_size"]
    version = f"{manifest['versions']['trainyard']}, format {manifest['format']}"
    return [_progress(manifest, run), f"{strategy}, {ranks} rank(s)", version]


def _progress(manifest: Mapping[str, Any], run: RunDirectory) -> str:
    """Steps, and tokens, samples or images."""
    plan, step = manifest.get("configuration", run.config)["plan"], manifest["step"]
    samples = step * plan["batch_samples"]
    count = samples if plan["unit"] == "samples" else samples * plan["tokens_per_sample"]
    return f"{step:,} steps, {count:,} {plan['unit']}"


def _marks(run: RunDirectory, path: Path, manifest: Mapping[str, Any]) -> list[str]:
    from trainers.batch_plan import in_steps

    name, marks = name_in(run, path), []
    pointers, config = read_pointers(run), run.config
    if pointers.get("last", {}).get("checkpoint") == name:
        marks.append("last")
    if (best := pointers.get("best", {})).get("checkpoint") == name:
        marks.append(f"best ({best['metric']} {best['value']:.4g})")
    saves = {"keep_every_steps": None, "keep_every_images": None, **config.checkpoints}
    every = in_steps(saves, "keep_every", config.plan.batch_samples)
    if manifest and every and manifest["step"] % every == 0:
        marks.append("kept for good")
    if manifest and path.name != f"step-{manifest['step']:08d}":
        marks.append("by this name no run finds it")
    return marks


def _size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def print_comparison(first: Path, second: Path) -> None:
    """Print how two checkpoints differ: what was said of them, configuration, every tensor."""
    from trainers.checkpoint import open_checkpoint
    from trainers.checkpoint_comparison import all_tensors, compare_facts, compare_tensors
    from trainers.tensor_pieces import OPTIMIZER, WEIGHTS, kind_of

    a, b = open_checkpoint(first), open_checkpoint(second)
    lines = [f"{first} -> {second}"]
    lines += [f"{key}: {change}" for key, change in compare_facts(a.manifest, b.manifest).items()]
    lines += _configuration(a.manifest, b.manifest)
    tensors = all_tensors(a), all_tensors(b)
    total = sum(stored.nbytes for side in tensors for stored in side.values())
    with byte_bar("Comparing", total) as advance:
        found = compare_tensors(*tensors, advance)
    for path, names in zip((first, second), found.only, strict=True):
        lines += [f"only in {path}: {name}" for name in names]
    lines += [f"other shape: {line}" for line in found.shapes]
    console = _console()
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    for kind in (WEIGHTS, OPTIMIZER):
        differences = [each for each in found.differences if kind_of(each.name) == kind]
        table = Table(f"{kind}: {len(differences)} differ", "dtype", "largest |a - b|", RELATIVE)
        for each in differences[:SHOWN]:
            values = f"{each.absolute:.3g}", f"{each.relative:.3g}"
            table.add_row(each.name, each.dtypes, *values)
        if differences:
            console.print(table)
    counts = f"{found.num_identical} tensor(s) are identical, {len(found.differences)} differ"
    if len(found.differences) > SHOWN:
        counts += f"; of weights and optimizer state the {SHOWN} that differ most are shown"
    console.print(counts, highlight=False)


def _configuration(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Keys whose values differ, interpolations resolved."""
    if "configuration" not in first or "configuration" not in second:
        return ["configuration: not compared, for format 2 does not have it"]
    a, b = flatten(first["configuration"]), flatten(second["configuration"])
    return [
        f"{key}: {a.get(key, '(absent)')} -> {b.get(key, '(absent)')}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key, "(absent)") != b.get(key, "(absent)")
    ]


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDTH)
