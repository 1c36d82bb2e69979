"""One rank of `benchmarks.cells`: trains cell after cell in one process group."""

import contextlib
import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.cells import Cell, configure
from benchmarks.kept_low import KeptLow
from benchmarks.two_networks import TwoNetworks
from datamodules.batch import IGNORED, TextBatch
from launch.run_directory import RunDirectory
from launch.train import fit
from modules.gan import GAN
from modules.gan_augmentation import Augmentation
from modules.gpt import GPT
from trainers.strategies.parts import PartsStrategy
from trainers.strategies.whole_state import WholeState

SPOILED_STEP, LET_GO_AFTER = 2, 4


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


class FrozenAndGivenGPT(FrozenGPT):
    """One that keeps gains and biases too, and gives all parameters to its optimizer."""

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """As its parent, with a group in part and a group in whole that nothing changes."""
        self.network.requires_grad_(True)
        built = super().configure_optimizers()
        self.network.blocks[0].requires_grad_(False)
        for parameter in self.network.parameters():
            parameter.requires_grad_(parameter.requires_grad and parameter.ndim >= 2)
        return built


class LetGoGPT(FrozenAndGivenGPT):
    """One that lets its first block go in the middle of the run."""

    def training_step(self, batch: TextBatch, batch_idx: int) -> dict[str, Tensor]:
        """As its parent."""
        self.network.blocks[0].requires_grad_(self.trainer.global_step >= LET_GO_AFTER)
        return super().training_step(batch, batch_idx)


class SpoiledGPT(GPT):
    """A GPT whose loss on the last rank is no number at one step."""

    def training_step(self, batch: TextBatch, batch_idx: int) -> dict[str, Tensor]:
        """As its parent."""
        step, trainer = super().training_step(batch, batch_idx), self.trainer
        is_last_rank = trainer.global_rank == trainer.world_size - 1
        if trainer.global_step == SPOILED_STEP - 1 and is_last_rank:
            step["loss"] = step["loss"] * float("nan")
        return step


class SpoiledUnfusedGPT(SpoiledGPT):
    """One whose optimizer cannot leave out a step by itself."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD, as `strategy=single` has it too."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


class PerRankMean(MaskedGPT):
    """Wrong: every rank's mean counts the same, however few targets it has."""

    def training_step(self, batch: TextBatch, batch_idx: int) -> dict[str, Tensor]:
        """The mean over this rank's targets."""
        step = super().training_step(batch, batch_idx)
        loss = step["loss"] * batch["targets"].numel() / (masked(batch)["targets"] != IGNORED).sum()
        return {**step, "loss": loss}


class FreezesNothing:
    """Wrong: the generator's loss leaves gradients in the discriminator, too."""

    @contextlib.contextmanager
    def phase(self, optimizer: Any, *, is_last: bool) -> Iterator[None]:
        """Freeze nothing."""
        self.stepped = optimizer.optimizer
        yield


class Unfrozen(FreezesNothing, TwoNetworks):
    """The two networks, wrong in that."""


class UnfrozenGAN(FreezesNothing, GAN):
    """A GAN, wrong in that."""


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


@contextlib.contextmanager
def without_state() -> Iterator[None]:
    """Continue with weights alone."""
    with mock.patch.object(WholeState, "load_optimizer_state_dict", return_value=None):
        yield


@contextlib.contextmanager
def as_they_come() -> Iterator[None]:
    """Let a recurrent network finish its gradients in an order that its lengths decide."""
    from modules import encoder_decoder_recurrent_blocks as blocks

    with mock.patch.object(blocks, "weights_of", lambda module: dict(module.named_parameters())):
        yield


@contextlib.contextmanager
def with_own_signs() -> Iterator[None]:
    """Adapt augmentation to what one rank sees."""
    observe = Augmentation.observe

    def observe_less(augmentation: Augmentation, signs: Tensor, count: int) -> None:
        observe(augmentation, signs / 2, count)

    with mock.patch.object(Augmentation, "observe", observe_less):
        yield


class Exchanges(TorchDispatchMode):
    """Notes the dtypes of what ranks add up."""

    noted: ClassVar[set[str]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do it, after a note."""
        if func.namespace == "c10d" and "reduce" in func.overloadpacket.__name__:
            values = [
                v for v in tree_leaves(args) if isinstance(v, Tensor) and v.is_floating_point()
            ]
            self.noted.update(str(value.dtype) for value in values)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def noting_exchanges() -> Iterator[None]:
    """Break nothing; note in which dtypes gradients are exchanged."""
    differentiate = PartsStrategy.differentiate

    def noted(strategy: PartsStrategy, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with Exchanges():
            differentiate(strategy, loss, *args, **kwargs)

    Exchanges.noted.clear()
    with mock.patch.object(PartsStrategy, "differentiate", noted):
        yield


CONTROLS: dict[str, tuple[str | None, Callable[[], contextlib.AbstractContextManager[Any]]]] = {
    "unfrozen": ("benchmarks.parity_ranks.Unfrozen", unchecked),
    "two_backwards": ("benchmarks.parity_ranks.TwoBackwards", unchecked),
    "unfrozen_gan": ("benchmarks.parity_ranks.UnfrozenGAN", unchecked),
    "own_signs": (None, with_own_signs),
    "no_clipping": (None, without_clipping),
    "per_rank_mean": ("benchmarks.parity_ranks.PerRankMean", contextlib.nullcontext),
    "no_reshard": (None, without_reshard),
    "lost_state": (None, without_state),
    "as_they_come": (None, as_they_come),
    "noted": (None, noting_exchanges),
    "kept_low": (None, partial(mock.patch, "trainers.strategies.replicated.Single", KeptLow)),
}
"""Name -> the module to put in, and what to break; the last two break nothing."""


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
            # Drawing a picture takes a third of a cell's time, waiting for the disk a tenth.
            with (
                mock.patch("trainers.metrics.plot_losses"),
                mock.patch("os.fsync"),
                contextlib.redirect_stdout(None),
            ):
                train_cell(cell, run)
        except Exception as error:
            (run.path / "error.txt").write_text(f"{type(error).__name__}: {error}")
            if os.environ.get("VERBOSE"):
                traceback.print_exc()
        if cell.control == "noted":
            (run.path / "exchanged.json").write_text(json.dumps(sorted(Exchanges.noted)))


if __name__ == "__main__":
    main()
