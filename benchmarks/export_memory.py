"""Memory of an export, for a checkpoint that is much larger than its largest tensor.

    python -m benchmarks.export_memory [--gib 3] [--ranks 4] [--width 1024] [--dtype bf16]

Writes a checkpoint of a GPT as ranks under ZeRO 3 do: each tensor in as many stretches, one in each
rank's file. Values are made as they are written, so that nothing large is in memory here either.
`launch.export` then runs in a process of its own, which tells the highest resident size (`VmHWM` of
Linux) less the resident size when its imports were done; in comparison the same weights are read
whole and saved by the safetensors library. The largest tensor is the table of 32,768 tokens:
128 MiB at a width of 1024.
"""

import argparse
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.million import in_new_process
from launch.export import build_without_values, export_run
from launch.run_directory import RunDirectory
from trainers.batch_plan import plan_run
from trainers.checkpoint import load_weights
from trainers.checkpoint_conversion import StoredRun
from trainers.checkpoint_parts import Save, finish, read_part, write_files
from trainers.stored_tensors import Stored

VOCABULARY, STEP = 2**15, 1
MODULE = "benchmarks.export_memory"


def configure(folder: Path, width: int, num_layers: int) -> DictConfig:
    """A run of a GPT, without data."""
    overrides = ["experiment=gpt_char_cpu", f"runs_dir={folder / 'runs'}", "run.name=large"]
    network = f"{{width: {width}, num_layers: {num_layers}, num_heads: 4, norm: rmsnorm}}"
    with hydra.initialize_config_module("conf", version_base=None):
        config = hydra.compose("train", [*overrides, f"module.network={network}"])
    OmegaConf.set_struct(config, False)
    facts = {"path": "", "bytes_per_token": None, "end_token": None}
    config.data = facts | {"vocab_size": VOCABULARY}
    config.plan = asdict(plan_run(config, world_size=1))
    return config


def values_of(name: str, start: int, stop: int) -> Tensor:
    """What a stretch of a tensor holds, by its name and place."""
    digest = blake2b(f"{name}[{start}:{stop}]".encode(), digest_size=7).digest()
    draw = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.empty(stop - start).uniform_(-1, 1, generator=draw)


def stretches(numel: int, ranks: int) -> list[tuple[int, int]]:
    """Start and end of what each rank has of a tensor, as ZeRO 3 cuts it."""
    length = -(-numel // ranks)
    return [(min(r * length, numel), min((r + 1) * length, numel)) for r in range(ranks)]


def write_run(folder: Path, *, width: int, num_layers: int, ranks: int) -> RunDirectory:
    """Write a run with one checkpoint."""
    run = RunDirectory(folder / "runs" / "large")
    run.path.mkdir(parents=True)
    config = configure(folder, width, num_layers)
    run.accept(config)
    shapes = {name: v.shape for name, v in build_without_values(config).state_dict().items()}
    path = run.checkpoints / f"step-{STEP:08d}"
    save = Save(path, path.with_name(".step.partial"), {}, {}, b"", STEP)
    for rank in range(ranks):
        for name, shape in shapes.items():
            save.runs[f"weights/{name}"] = _run(name, shape, *stretches(shape.numel(), ranks)[rank])
        write_files(save, rank, ranks)
    parts = [read_part(save.scratch, rank) for rank in range(ranks)]
    finish(save, [part for part in parts if part is not None], {"strategy": "zero3"})
    (run.checkpoints / "last").write_text(path.name)
    return run


def _run(name: str, shape: torch.Size, start: int, stop: int) -> StoredRun:
    read = Stored(
        torch.Size([stop - start]), torch.float32, lambda *_: values_of(name, start, stop)
    )
    return StoredRun(shape, start, torch.empty(stop - start, device="meta"), stored=read)


def export(folder: str, dtype: str | None) -> list[float]:
    """Export a run's last checkpoint; bytes at the peak above those after imports, and seconds."""
    with hydra.initialize_config_module("conf", version_base=None):
        config = hydra.compose("export", [f"run={folder}", f"dtype={dtype or 'null'}"])
    return _measured(partial(export_run, config))


def save_whole(folder: str) -> list[float]:
    """The same with all weights in memory."""
    run = RunDirectory(Path(folder))

    def work() -> None:
        path = run.find_checkpoint("last")
        assert path is not None
        save_file(load_weights(path), run.path / "whole.safetensors")

    return _measured(work)


def _measured(work: Callable[[], Any]) -> list[float]:
    import lightning  # noqa: F401 - what an export imports, too

    import modules.gpt  # noqa: F401

    before, begun = _resident("VmRSS"), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")  # sets the highest size to the present one
    work()
    return [_resident("VmHWM") - before, time.perf_counter() - begun]


def _resident(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{key}:\s+(\d+) kB", status)
    assert found is not None
    return 1024 * int(found[1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gib", type=float, default=3)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--dtype", default=None)
    options = parser.parse_args()
    table, width = 4 * VOCABULARY * options.width, options.width
    num_layers = max(1, round((options.gib * 2**30 - table) / (4 * 12 * width**2)))
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder), width=width, num_layers=num_layers, ranks=options.ranks)
        size = sum(file.stat().st_size for file in run.checkpoints.rglob("*.safetensors"))
        sides = {
            "launch.export": in_new_process(MODULE, export, str(run.path), options.dtype),
            "all in memory": in_new_process(MODULE, save_whole, str(run.path)),
        }
    found = Table("", "peak above imports", "of the largest tensor", "seconds")
    found.title = f"{decimal(size)} in {options.ranks} files, largest tensor {decimal(table)}"
    for name, (peak, seconds) in sides.items():
        found.add_row(name, decimal(int(peak)), f"{peak / table:.2f}", f"{seconds:.1f}")
    Console(width=100).print(found)


if __name__ == "__main__":
    main()
