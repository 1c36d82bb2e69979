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
import time
import warnings
from collections.abc import Iterable
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
        sizes: Any = pl_module
        parameters = sum(size.numel() for size in sizes._sizes.values())
        # A thread of gloo may hold the buffer of the last exchange for a moment longer.
        live = min(self._bytes_soon() for _ in range(3))
        result = {"bytes": live, "parameters": parameters}
        (self.path / f"live-{trainer.global_rank}.json").write_text(json.dumps(result))

    def _bytes_soon(self) -> int:
        time.sleep(0.1)
        return sum(n for k, n in live_storages().items() if self.before.get(k) != n)


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


def all_cells(strategies: Iterable[str] = STRATEGIES) -> list[Cell]:
    """Each strategy with parameters in fp32 and, where it has the choice, low ones in bf16."""
    return [
        Cell("gpt", name, precision, optimizer="adamw", parameters=parameters)
        for precision, parameters in (("fp32", "fp32"), ("bf16", "low"))
        for name in strategies
        if not (name == "ddp" and parameters == "low")
    ]


def formula(cell: Cell, ranks: int) -> float:
    """Bytes per parameter that a cell should take on a rank."""
    return bytes_per_parameter(cell.strategy, ranks, low=cell.parameters == "low").total


def measure(cells: list[Cell], folder: Path, ranks: int) -> dict[Cell, float]:
    """Bytes per parameter of each cell on its fullest rank; ranks are started once for all.

    Raises:
        RuntimeError: A run failed.
    """
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
    start_ranks("benchmarks.parity_ranks", [str(jobs)], ranks)
    return {cell: _on_fullest_rank(folder / "runs" / cell.name) for cell in cells}


def _on_fullest_rank(run: Path) -> float:
    if (error := run / "error.txt").exists():
        raise RuntimeError(f"{run.name} -> {error.read_text()}")
    rows = [json.loads(file.read_text()) for file in run.glob("live-*.json")]
    return max(row["bytes"] / row["parameters"] for row in rows)


def main() -> None:
    """Measure and print."""
    options: dict[str, Any] = {
        "ranks": 2,
        "strategies": ",".join(STRATEGIES),
        "parameters": "fp32,low",
    }
    options |= dict(OmegaConf.from_dotlist(sys.argv[1:]))  # type: ignore[arg-type]
    ranks, kept = int(options["ranks"]), options["parameters"].split(",")
    cells = [c for c in all_cells(options["strategies"].split(",")) if c.parameters in kept]
    table = Table("strategy", "parameters", "bytes measured", "formula", "ratio")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(cells, Path(folder), ranks)
    for cell, measured in found.items():
        expected = formula(cell, ranks)
        numbers = f"{measured:.2f}", f"{expected:.2f}", f"{measured / expected:.3f}"
        table.add_row(cell.strategy, cell.parameters, *numbers)
    Console(width=100).print(table)
    print(f"bytes per parameter on the fullest of {ranks} ranks")


if __name__ == "__main__":
    main()
