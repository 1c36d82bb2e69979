"""Bytes of live tensors per rank, strategy by strategy, beside the formula of docs/parallelism.md.

    python -m benchmarks.memory ranks=2 [parameters=fp32,low] [strategies=...]

Counts the storages of all tensors that exist, once each, just before an optimizer step (gradients
exchanged, activations gone), less those that existed before the model was built. AdamW, a GPT of
3.2 million parameters, small communication buckets. On a CPU: the resident size of a process says
nothing about ZeRO, which gives memory back to the allocator only.
"""

import gc
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch.distributed.tensor import DTensor

from benchmarks.cells import STRATEGIES, Cell, configure, start_ranks, write_text
from launch.run_directory import RunDirectory
from trainers.strategies.memory import bytes_per_parameter

STEP = 2


class LiveBytes(Callback):
    """Writes the bytes of live tensors before an optimizer step to `live-<rank>.json`."""

    def __init__(self, path: str):
        self.path = Path(path)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Count what is there before the model has storage."""
        self.before = live_storages()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        """Count again."""
        if trainer.global_step != STEP:
            return
        new = {k: n for k, n in live_storages().items() if self.before.get(k) != n}
        sizes: Any = pl_module
        parameters = sum(size.numel() for size in sizes._sizes.values())
        result = {"bytes": sum(new.values()), "parameters": parameters}
        (self.path / f"live-{trainer.global_rank}.json").write_text(json.dumps(result))


def live_storages() -> dict[int, int]:
    """Address -> bytes of every storage that a tensor refers to."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are asked what they are
        tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    tensors = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    storages = [t.untyped_storage() for t in tensors if not t.is_meta]
    return {s.data_ptr(): s.nbytes() for s in storages if s.nbytes()}


def measure(cells: list[Cell], folder: Path, ranks: int) -> dict[Cell, tuple[float, int]]:
    """Bytes per parameter of each cell on its fullest rank, and the number of parameters."""
    write_text(folder)
    for cell in cells:
        config = configure(cell, folder, ranks, "cpu")
        OmegaConf.set_struct(config, False)
        config.module.network.merge_with({"num_layers": 4, "num_heads": 4, "width": 256})
        run = RunDirectory(folder / "runs" / cell.name)
        run.path.mkdir(parents=True)
        config.trainer.callbacks = {
            "live": {"_target_": "benchmarks.memory.LiveBytes", "path": str(run.path)}
        }
        config.plan.max_steps = STEP + 1
        run.accept(config)
    (jobs := folder / f"memory-{ranks}.json").write_text(json.dumps([c.as_dict() for c in cells]))
    start_ranks([str(jobs)], ranks)
    found = {}
    for cell in cells:
        files = list((folder / "runs" / cell.name).glob("live-*.json"))
        rows = [json.loads(file.read_text()) for file in files]
        fullest = max(rows, key=lambda row: row["bytes"])
        found[cell] = (fullest["bytes"] / fullest["parameters"], fullest["parameters"])
    return found


def main() -> None:
    """Measure and print."""
    options: dict[str, Any] = {
        "ranks": 2,
        "strategies": ",".join(STRATEGIES),
        "parameters": "fp32,low",
    }
    options |= dict(OmegaConf.from_dotlist(sys.argv[1:]))  # type: ignore[arg-type]
    cells = [
        Cell("gpt", name, "fp32" if kept == "fp32" else "bf16", optimizer="adamw", parameters=kept)
        for kept in options["parameters"].split(",")
        for name in options["strategies"].split(",")
        if not (name == "ddp" and kept == "low")
    ]
    table = Table("strategy", "parameters", "bytes measured", "formula", "ratio")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(cells, Path(folder), int(options["ranks"]))
    for cell, (measured, _) in found.items():
        low = cell.parameters == "low"
        formula = bytes_per_parameter(cell.strategy, int(options["ranks"]), low=low).total
        ratio = f"{measured / formula:.3f}"
        table.add_row(cell.strategy, cell.parameters, f"{measured:.2f}", f"{formula:.2f}", ratio)
    Console(width=100).print(table)
    print(f"bytes per parameter on the fullest of {options['ranks']} ranks")


if __name__ == "__main__":
    main()
