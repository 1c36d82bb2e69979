"""Ways in which Lightning would lose the stream's place, each with and without the remedy."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy

from datamodules import stream
from datamodules.loader import TrainLoader
from datamodules.stream import StreamDataModule
from tests.datamodules.lives import Numbers
from trainers.callbacks.checkpointing import Checkpointing

pytestmark = [
    # Lightning 2.6 uses what torch 2.13 deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable:UserWarning"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

G, STEPS, STOPPED = 8, 20, 6


class NumbersData(StreamDataModule):
    """A stream of numbers; the settings that every test shares."""

    def __init__(self, **settings: Any) -> None:
        defaults: dict[str, Any] = {
            "batch_samples": G,
            "micro_batch": G,
            "max_samples": STEPS * G,
            "num_workers": 0,
            "repeat_first_batch": False,
            "window_mb": 1,
            "tail": "drop",
            "seed": 3,
            "val_max_samples": None,
            "on_bad_sample": "raise",
            "max_bad_samples": 0,
            "cache": {},
        }
        super().__init__(**{**defaults, **settings})

    def source(self, split: str) -> Numbers:
        return Numbers([30, 20, 9])


class Recorder(LightningModule):
    """Writes down every batch, and the steps at which it was validated."""

    def __init__(self, counts_steps: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.counts_steps = counts_steps
        self.batches: list[list[int]] = []
        self.validated_at: list[int] = []

    def training_step(self, batch: list[int]) -> torch.Tensor:
        self.batches.append(batch)
        return self.weight * sum(batch)

    def validation_step(self, batch: list[int]) -> None:
        if self.validated_at[-1:] != [self.global_step]:
            self.validated_at.append(self.global_step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.counts_steps:  # as schedules do that need the length of the run
            assert self.trainer.estimated_stepping_batches == STEPS
        return torch.optim.SGD(self.parameters(), lr=1e-6)


class Stop(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == STOPPED and not trainer.should_stop:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def on_cpu(strategy: type[SingleDeviceStrategy]) -> SingleDeviceStrategy:
    return strategy(device="cpu", accelerator=CPUAccelerator())


def fit(
    data: StreamDataModule,
    resume: Path | None = None,
    callbacks: tuple[Callback, ...] = (),
    counts_steps: bool = False,
    **settings: Any,
) -> Recorder:
    trainer = Trainer(
        max_epochs=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[*callbacks],
        **{"strategy": on_cpu(SingleDeviceStrategy), "limit_val_batches": 0, **settings},
    )
    recorder = Recorder(counts_steps)
    trainer.fit(recorder, data, ckpt_path=resume)
    return recorder


def stop_and_resume(make: type[NumbersData], path: Path, **settings: Any) -> list[list[int]]:
    """Batches of a run that was stopped, and of the one that went on from its checkpoint."""
    before = fit(make(), None, (Stop(path / "stopped.ckpt"),), **settings).batches
    assert len(before) == STOPPED
    return before + fit(make(), path / "stopped.ckpt", **settings).batches


@pytest.fixture(scope="module")
def whole() -> list[list[int]]:
    batches = fit(NumbersData()).batches
    assert len(batches) == STEPS
    return batches


def test_loader_with_a_length_loses_no_batch(
    whole: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stop_and_resume(NumbersData, tmp_path) == whole

    class Unsized(TrainLoader):
        __len__ = None  # type: ignore[assignment]

    monkeypatch.setattr(stream, "TrainLoader", Unsized)
    # Lightning looks a batch ahead, to see whether there is one.
    assert stop_and_resume(NumbersData, tmp_path) == whole[:STOPPED] + whole[STOPPED + 1 :]


def test_state_in_the_datamodule_survives_a_count_of_steps(
    whole: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stop_and_resume(NumbersData, tmp_path, counts_steps=True) == whole
    assert not hasattr(TrainLoader, "state_dict")
    assert not hasattr(TrainLoader, "load_state_dict")

    class Stateful(TrainLoader):
        state_dict = TrainLoader.stream_state
        load_state_dict = TrainLoader.restore

    class Stateless(NumbersData):
        def state_dict(self) -> dict[str, Any]:
            return {}

    monkeypatch.setattr(stream, "TrainLoader", Stateful)
    assert stop_and_resume(Stateless, tmp_path) == whole  # Lightning keeps the loader's state
    batches = stop_and_resume(Stateless, tmp_path, counts_steps=True)
    assert batches[STOPPED : STOPPED + 3] == whole[:3]  # and loses it where loaders exist early


class RestoresLate(SingleDeviceStrategy):
    """Restores when all is set up, as DeepSpeed and FSDP do."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True


@pytest.mark.parametrize("counts_steps", [False, True])
def test_state_that_comes_late_reaches_the_loader(
    counts_steps: bool, whole: list[list[int]], tmp_path: Path
) -> None:
    settings = {"strategy": on_cpu(RestoresLate), "counts_steps": counts_steps}
    assert stop_and_resume(NumbersData, tmp_path, **settings) == whole

    class KeepsToItself(NumbersData):
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self._stream_state = state_dict

    batches = stop_and_resume(KeepsToItself, tmp_path, **settings)
    # Counting the steps makes the loader before the state arrives.
    assert (batches == whole) == (not counts_steps)
    assert counts_steps == (batches[STOPPED : STOPPED + 3] == whole[:3])


def test_state_that_comes_after_iter_reaches_the_loader(
    whole: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_batch_of() -> list[int]:
        data = NumbersData()
        batches = iter(data.train_dataloader())
        data.load_state_dict({**data.state_dict(), "position": STOPPED * G})
        return next(batches)

    assert first_batch_of() == whole[STOPPED]

    class Eager(TrainLoader):
        def __iter__(self) -> Iterator[Any]:
            batches = super().__iter__()
            first = next(batches)
            return iter([first, *batches])

    monkeypatch.setattr(stream, "TrainLoader", Eager)
    assert first_batch_of() == whole[0]


class Rescale(Callback):
    """The part of `Checkpointing` that puts Lightning's counters right."""

    _validation_pending = False
    on_save_checkpoint = Checkpointing.on_save_checkpoint
    on_load_checkpoint = Checkpointing.on_load_checkpoint


@pytest.mark.parametrize(("before", "after"), [(4, 1), (1, 4), (2, 4), (2, 2)])
def test_validation_keeps_its_steps_when_micro_batches_change(
    before: int, after: int, tmp_path: Path
) -> None:
    def run(accumulation: int, resume: Path | None, *callbacks: Callback) -> Recorder:
        return fit(
            NumbersData(micro_batch=G // accumulation),
            resume,
            callbacks,
            accumulate_grad_batches=accumulation,
            val_check_interval=4 * accumulation,
            limit_val_batches=1,
        )

    steps = [4, 8, 12, 16, 20]
    assert run(after, None).validated_at == steps
    stopped = tmp_path / "stopped.ckpt"
    run(before, None, Rescale(), Stop(stopped))
    resumed = run(after, stopped, Rescale())
    assert resumed.validated_at == steps[1:]
    assert len(resumed.batches) == (STEPS - STOPPED) * after
    left_alone = run(after, stopped)
    assert (left_alone.validated_at == steps[1:]) == (before == after)
