"""Bytes of live tensors per rank and kind, beside the formula of docs/parallelism.md.

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
from dataclasses import asdict
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

STEP = 1
KINDS: tuple[str, ...] = ("parameters", "gradients", "masters", "optimizer")
BUCKET = 10_000
"""Elements of DeepSpeed's buffers, which count as gradients."""


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
        counts = [self._bytes_soon(trainer.strategy) for _ in range(3)]
        live = min(counts, key=lambda count: sum(count.values()))
        result = {"bytes": live, "parameters": parameters}
        (self.path / f"live-{trainer.global_rank}.json").write_text(json.dumps(result))

    def _bytes_soon(self, strategy: Any) -> dict[str, int]:
        time.sleep(0.1)
        kinds, sums = kinds_of_storages(strategy), dict.fromkeys(KINDS, 0)
        for address, size in live_storages().items():
            if self.before.get(address) != size:
                sums[kinds.get(address, "gradients")] += size
        return sums


def kinds_of_storages(strategy: Any) -> dict[int, str]:
    """Address -> what a strategy keeps there, of all storages but those of gradients.

    DeepSpeed has gradients in too many places to name them all; they are what is left, and the few
    communication buffers with them.
    """
    own = list(strategy.module.parameters())
    optimizers = [e.optimizer.optimizer for e in getattr(strategy, "engines", {}).values()]
    states = [s for o in (*strategy.optimizers, *optimizers) for s in o.state.values()]
    owners = {
        "masters": [shard.flat for shard in getattr(strategy, "shards", {}).values()],
        "optimizer": [value for state in states for value in state.values()],
        "parameters": [*own, *(p.ds_tensor for p in own if hasattr(p, "ds_tensor"))],
    }
    return {
        storage_of(value).data_ptr(): kind
        for kind, values in owners.items()
        for value in values
        if isinstance(value, torch.Tensor)
    }


def storage_of(tensor: torch.Tensor) -> torch.UntypedStorage:
    """Where a tensor, or this rank's shard of it, lies."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()


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


def formula(cell: Cell, ranks: int) -> dict[str, float]:
    """Kind -> bytes per parameter that a cell should take on a rank."""
    return asdict(bytes_per_parameter(cell.strategy, ranks, low=cell.parameters == "low"))


def measure(cells: list[Cell], folder: Path, ranks: int) -> dict[Cell, dict[str, float]]:
    """Kind -> bytes per parameter, of each cell on its fullest rank; ranks are started once.

    Raises:
        RuntimeError: A run failed.
    """
    write_text(folder)
    for cell in cells:
        config = configure(cell, folder, ranks, "cpu")
        OmegaConf.set_struct(config, False)
        config.module.network.merge_with({"num_layers": 4, "num_heads": 4, "width": 256})
        if "config" in config.strategy.make:
            config.strategy.make.config.zero_optimization.reduce_bucket_size = BUCKET
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


def _on_fullest_rank(run: Path) -> dict[str, float]:
    if (error := run / "error.txt").exists():
        raise RuntimeError(f"{run.name} -> {error.read_text()}")
    rows = [json.loads(file.read_text()) for file in run.glob("live-*.json")]
    found = [{kind: n / row["parameters"] for kind, n in row["bytes"].items()} for row in rows]
    return max(found, key=lambda kinds: sum(kinds.values()))


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
    table = Table("strategy", "parameters", *KINDS, "bytes measured", "formula", "ratio")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(cells, Path(folder), ranks)
    for cell, measured in found.items():
        total, expected = sum(measured.values()), sum(formula(cell, ranks).values())
        numbers = *measured.values(), total, expected, total / expected
        table.add_row(cell.strategy, cell.parameters, *(f"{number:.3g}" for number in numbers))
    Console(width=100).print(table)
    print(f"bytes per parameter on the fullest of {ranks} ranks")


if __name__ == "__main__":
    main()
