"""One save: what of it each rank writes, and how that becomes a checkpoint."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import do_nothing_closure
from torch import Tensor

from trainers.checkpoint import FORMAT_VERSION, MANIFEST, STATE, put_in_place
from trainers.checkpoint_digests import seal
from trainers.durable_files import digest_of, sync_directory, write_atomically, write_synced
from trainers.safetensors_file import NAMES, Entry, write_tensors
from trainers.stored_tensors import Run
from trainers.tensor_pieces import OPTIMIZER, WEIGHTS, file_name, key_of, kind_of


@dataclass(frozen=True)
class Save:
    """One save on its way.

    Attributes:
        path: Where the checkpoint will be.
        scratch: Where it is being written.
        runs: What this rank writes, by full name, on the CPU.
        aliases: Further name -> name, of tied tensors.
        state: Content of `state.pt`, of rank 0.
        step: Of the run.
        then: Is called on rank 0 when the checkpoint is in its place.
    """

    path: Path
    scratch: Path
    runs: dict[str, Run]
    aliases: dict[str, str]
    state: bytes
    step: int
    then: Callable[[], None] = do_nothing_closure


def flatten(
    checkpoint: Mapping[str, Any],
) -> tuple[dict[str, Run], dict[str, str], dict[str, Any]]:
    """Take the tensors to be saved in files of their own out of Lightning's dictionary.

    Returns:
        Full name -> `Run`; further name -> name, of values that are one; and what remains.

    Raises:
        ValueError: The files cannot hold one of the tensors.
    """
    runs: dict[str, Run] = {}
    aliases: dict[str, str] = {}
    seen: dict[int, str] = {}
    for name, value in checkpoint["state_dict"].items():
        full = f"{WEIGHTS}/{name}"
        if (first := seen.setdefault(id(value), full)) != full:
            aliases[full] = first
        else:
            runs[full] = Run.whole(value) if isinstance(value, Tensor) else value
    states = []
    for index, saved in enumerate(checkpoint.get("optimizer_states", [])):
        small: dict[Any, dict[str, Any]] = {}
        for name, values in saved["state"].items():
            small[name] = {k: v for k, v in values.items() if not isinstance(v, Run)}
            for key, value in values.items():
                if isinstance(value, Run):
                    runs[f"{OPTIMIZER}.{index}/{key}/{name}"] = value
        states.append({**saved, "state": small})
    for name, run in runs.items():
        if run.values.dtype not in NAMES:
            raise ValueError(
                f"checkpoint -> {name} is of {run.values.dtype}, which safetensors files do not "
                f"hold -> use one of {', '.join(str(dtype) for dtype in NAMES)}"
            )
    rest = {key: value for key, value in checkpoint.items() if key != "state_dict"}
    return runs, aliases, rest | {"optimizer_states": states}


def write_files(save: Save, rank: int, num_ranks: int) -> None:
    """Write and sync what this rank has, and then what it has written."""
    save.scratch.mkdir(parents=True, exist_ok=True)
    files: dict[str, Any] = {}
    for kind in (WEIGHTS, OPTIMIZER):
        mine = [
            _entry(name, run)
            for name, run in save.runs.items()
            if kind_of(name) == kind and run.values.numel()
        ]
        file = file_name(kind, rank, num_ranks)
        files[file] = write_tensors(save.scratch / file, mine)
    if rank == 0:
        path = save.scratch / STATE
        write_synced(path, save.state)
        files[STATE] = {"bytes": len(save.state), "blake2b": digest_of(path)}
    tensors = {
        name: {"dtype": NAMES[run.values.dtype], "shape": [*run.shape]}
        | {"pieces": [[rank, run.start, run.stop]] if run.values.numel() else []}
        for name, run in save.runs.items()
    }
    text = json.dumps({"files": files, "tensors": tensors})
    # Synced before rank 0 can see it, which then moves the directory.
    written = save.scratch / f".{_part_name(rank)}"
    write_synced(written, text.encode())
    sync_directory(save.scratch)
    written.replace(save.scratch / _part_name(rank))


def remove_files(save: Save, rank: int) -> None:
    """Remove what a rank has written of a save that failed; rank 0 what all have."""
    if rank == 0:
        shutil.rmtree(save.scratch, ignore_errors=True)
    for path in save.scratch.glob(f"*-{rank + 1:05d}-of-*"):
        path.unlink(missing_ok=True)


def _entry(name: str, run: Run) -> Entry:
    is_whole = run.values.numel() == run.shape.numel()
    shape = tuple(run.shape) if is_whole else tuple(run.values.shape)
    key = key_of(name, run.start, run.stop, run.shape.numel())
    return Entry(key, run.values.dtype, shape, lambda: run.read().view(shape))


def merge(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Put together where the pieces of all tensors are.

    Raises:
        ValueError: Some of a tensor is in no file, or twice.
    """
    tensors: dict[str, Any] = {}
    for part in parts:
        for name, facts in part["tensors"].items():
            tensors.setdefault(name, {**facts, "pieces": []})["pieces"] += facts["pieces"]
    for name, facts in tensors.items():
        facts["pieces"].sort(key=lambda piece: piece[1])
        end = 0
        for _, start, stop in facts["pieces"]:
            if start != end:
                raise ValueError(f"{name} -> elements {end} to {start} were not saved once")
            end = stop
        if end != torch.Size(facts["shape"]).numel():
            raise ValueError(f"{name} -> elements from {end} on were not saved")
    return tensors


def read_part(scratch: Path, rank: int) -> dict[str, Any] | None:
    """What a rank has written; None before it has."""
    path = scratch / _part_name(rank)
    return json.loads(path.read_text()) if path.exists() else None


def finish(save: Save, parts: list[dict[str, Any]], facts: Mapping[str, Any]) -> None:
    """Add the manifest to what all ranks have written, and put the checkpoint into its place."""
    manifest = {
        "format": FORMAT_VERSION,
        "step": save.step,
        "files": {name: file for part in parts for name, file in part["files"].items()},
        "versions": {name: _version(name) for name in ("trainyard", "torch", "lightning")},
        **facts,
        "world_size": len(parts),
        "aliases": save.aliases,
        "tensors": merge(parts),
    }
    write_atomically(save.scratch / MANIFEST, seal(manifest))
    for rank in range(len(parts)):
        (save.scratch / _part_name(rank)).unlink()
    sync_directory(save.scratch)
    put_in_place(save.scratch, save.path)
    save.then()


def without_credentials(config: Any) -> Any:
    """A configuration for files that leave the machine: options of file systems may hold keys."""
    if isinstance(config, Mapping):
        return {
            key: "(left out)" if key == "storage_options" and value else without_credentials(value)
            for key, value in config.items()
        }
    return [without_credentials(each) for each in config] if isinstance(config, list) else config


def _part_name(rank: int) -> str:
    return f"rank-{rank + 1:05d}.json"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a clone on PYTHONPATH that nobody installed
        return "not installed"
