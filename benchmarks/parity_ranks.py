"""One rank of `benchmarks.cells`: trains cell after cell in one process group."""

import contextlib
import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

from benchmarks.cells import Cell, configure
from benchmarks.two_networks import TwoNetworks
from datamodules.batch import IGNORED, TextBatch
from launch.run_directory import RunDirectory
from launch.train import fit
from modules.gpt import GPT
from trainers.strategies.parts import PartsStrategy


class MaskedGPT(GPT):
    """A GPT that predicts few tokens of a row, and many more on some ranks than on others."""

    def training_step(self, batch: TextBatch, batch_idx: int) -> dict[str, Tensor]:
        """As its parent, with targets ignored by what they are."""
        return super().training_step(masked(batch), batch_idx)


def masked(batch: TextBatch) -> TextBatch:
    """Ignore targets where the row's first token says so."""
    keep = (batch["inputs"] * 7 + batch["inputs"][:, :1]) % 5 < batch["inputs"][:, :1] % 4 + 1
    return {**batch, "targets": batch["targets"].where(keep, IGNORED)}


class FrozenGPT(GPT):
    """A GPT that keeps its first block as it is."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.network.blocks[0].requires_grad_(False)


class PerRankMean(MaskedGPT):
    """Wrong: every rank's mean counts the same, however few targets it has."""

    def training_step(self, batch: TextBatch, batch_idx: int) -> dict[str, Tensor]:
        """The mean over this rank's targets."""
        step = super().training_step(batch, batch_idx)
        loss = step["loss"] * batch["targets"].numel() / (masked(batch)["targets"] != IGNORED).sum()
        return {**step, "loss": loss}


class Unfrozen(TwoNetworks):
    """Wrong: the generator's loss leaves gradients in the discriminator, too."""

    @contextlib.contextmanager
    def phase(self, optimizer: Any, *, is_last: bool) -> Iterator[None]:
        """Freeze nothing."""
        self.stepped = optimizer.optimizer
        yield


class TwoBackwards(TwoNetworks):
    """Wrong under ZeRO: two backward passes, each exchanged, before one step."""

    @contextlib.contextmanager
    def phase(self, optimizer: Any, *, is_last: bool) -> Iterator[None]:
        """As it should be."""
        self.stepped = optimizer.optimizer
        with super().phase(optimizer, is_last=is_last):
            yield

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Differentiate in two halves."""
        super().manual_backward(loss / 2, retain_graph=True)
        super().manual_backward(loss / 2)


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Take the contract's assertion away, so that what it prevents can be seen."""

    def differentiate(strategy: PartsStrategy, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        part = strategy.part_of(strategy.module.stepped)  # type: ignore
        strategy.backward_of(part, loss, *args, **kwargs)

    with mock.patch.object(PartsStrategy, "differentiate", differentiate):
        yield


@contextlib.contextmanager
def without_clipping() -> Iterator[None]:
    """Clip nothing."""
    with mock.patch.object(PartsStrategy, "clip_of", return_value=None):
        yield


@contextlib.contextmanager
def without_reshard() -> Iterator[None]:
    """Step on gradients of parameters that FSDP2 still holds whole."""
    from trainers.strategies.fsdp import FullySharded

    with mock.patch.object(FullySharded, "finish_gradients", return_value=None):
        yield


CONTROLS: dict[str, tuple[str | None, Callable[[], contextlib.AbstractContextManager[None]]]] = {
    "unfrozen": ("benchmarks.parity_ranks.Unfrozen", unchecked),
    "two_backwards": ("benchmarks.parity_ranks.TwoBackwards", unchecked),
    "no_clipping": (None, without_clipping),
    "per_rank_mean": ("benchmarks.parity_ranks.PerRankMean", contextlib.nullcontext),
    "no_reshard": (None, without_reshard),
}
"""Name -> the module to put in, and what to break."""


def train_cell(cell: Cell, run: RunDirectory) -> None:
    """Train a cell, in one go or in two."""
    config = run.config
    broken = contextlib.nullcontext
    if cell.control:
        target, broken = CONTROLS[cell.control]
        config.module._target_ = target or config.module._target_
    with broken():
        if cell.stop_at:
            shorter = config.copy()
            shorter.plan.max_steps = cell.stop_at
            if cell.begun:
                trainer, folder = config.trainer, run.path.parent.parent
                begun = replace(cell, strategy=cell.begun)
                other = configure(begun, folder, trainer.devices, trainer.accelerator)
                shorter.strategy = other.strategy
            fit(run, shorter)
        fit(run, config)


def main() -> None:
    """Train the cells of a file."""
    jobs = Path(sys.argv[1])
    for values in json.loads(jobs.read_text()):
        cell = Cell(**values)
        gc.collect()
        gc.freeze()  # what stays from cell to cell need not be looked through at each collection
        run = RunDirectory(jobs.parent / "runs" / cell.name)
        try:
            with contextlib.redirect_stdout(None):
                train_cell(cell, run)
        except Exception as error:
            (run.path / "error.txt").write_text(f"{type(error).__name__}: {error}")
            if os.environ.get("VERBOSE"):
                traceback.print_exc()


if __name__ == "__main__":
    main()
