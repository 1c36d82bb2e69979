"""When a run saves, what it keeps, and how it is picked up again."""

import json
import time
from collections.abc import Container, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from trainers.callbacks.step_guard import StepGuard
from trainers.callbacks.step_vote import StepVote
from trainers.checkpoint import list_checkpoints, remove_checkpoint, remove_leftovers, size_of
from trainers.checkpoint_writer import CheckpointDirectory
from trainers.durable_files import write_atomically


class Checkpointing(Callback):
    """Saves at optimizer-step boundaries: every so often, at the best validation, and at the end.

    `last` names the newest checkpoint and moves only when its bytes are durable; `best` names the
    one with the lowest `monitor`. Where validation is due at the same step, saving waits for it, so
    that a resumed run neither repeats nor misses a validation.

    Saves go on beside the training (`trainers/checkpoint_writer.py`); the next one, the end and a
    signal to stop wait for them.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        every_steps: int | None,
        every_minutes: float | None,
        keep_last: int,
        keep_every_steps: int | None,
        max_gib: float | None,
        monitor: str,
        guard: StepGuard,
        vote: StepVote,
    ):
        """Take the policy.

        Args:
            directory: Where the checkpoints of the run live.
            every_steps: Save every this many optimizer steps; None for not by steps.
            every_minutes: Save when this many minutes have passed; None for not by time.
            keep_last: Newest checkpoints to keep; others are deleted unless kept for a reason.
            keep_every_steps: Keep those at multiples of this many steps for good; None for none.
            max_gib: Size that all together may have after a save, in GiB: the oldest go, whatever
                they are kept for, but never the newest and the best; None for any.
            monitor: Validation metric, lower is better, that decides `best`.
            guard: Knows whether what would be saved is worth it.
            vote: Makes the clock of any rank the clock of all.
        """
        self.directory = Path(directory)
        self.every_steps = every_steps
        self.every_minutes = every_minutes
        self.keep_last = keep_last
        self.keep_every_steps = keep_every_steps
        self.max_gib = max_gib
        self.monitor = monitor
        self.guard = guard
        self.vote = vote
        if every_minutes is not None:
            vote.questions["save"] = self._is_late
        self._saved_at = time.monotonic()
        self._saved_step = 0
        self._validation_pending = False
        self._best = float("inf")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tidy up after a crash, also where the last step is saved and no training starts."""
        if stage == "fit" and trainer.is_global_zero:
            remove_leftovers(self.directory)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from here."""
        if writer_of(trainer).drops_optimizer:
            _set_rates(trainer)
        self._best = self._best_value()
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write down what Lightning's counters do not tell when they are read again."""
        checkpoint["grad_accum"] = trainer.accumulate_grad_batches
        checkpoint["validation_pending"] = self._validation_pending

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Bring Lightning's batch counters into this launch's accumulation.

        They count micro-batches of a rank, whose size changes with the world size. Left alone,
        validation would fall on the wrong steps and the run would end early or late.

        A run that was asked to stop may have saved just before a validation, which Lightning would
        then take for done; it is told that the validation has begun, and so makes it first.

        Its last batch is none of a run that is trained longer.
        """
        loops = checkpoint["loops"]["fit_loop"]
        loops["epoch_loop.batch_progress"]["is_last_batch"] = False
        if checkpoint["validation_pending"]:
            counts = loops["epoch_loop.val_loop.batch_progress"]
            counts["current"] = dict.fromkeys(counts["current"], 0)
            counts["total"] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        old, new = checkpoint["grad_accum"], trainer.accumulate_grad_batches
        if old == new:
            return
        progress = loops["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            behind = counts["processed"] - counts["completed"]  # 1 when saved at the batch's end
            for key in ("ready", "started", "processed"):
                counts[key] = counts[key] * new // old
            counts["completed"] = counts["processed"] - behind

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time; make the run's last step one that validates."""
        accum = trainer.accumulate_grad_batches
        if (batch_idx + 1) % accum:
            return
        writer_of(trainer).raise_failure()
        every = trainer.val_check_batch or batch_idx + 1
        if trainer.global_step >= trainer.max_steps:
            every = trainer.val_check_batch = batch_idx + 1
        # Not limit_val_batches: a module without validation_step never comes to on_validation_end.
        self._validation_pending = trainer.enable_validation and (batch_idx + 1) % every == 0
        if not self._validation_pending and self._is_due(trainer):
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after a validation that is the best so far, or that a due save has waited for."""
        if trainer.state.fn != "fit":
            return
        self._validation_pending = False
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(k for k in trainer.callback_metrics if k.startswith("val/")) or "none"
            raise ValueError(
                f"checkpoints.monitor={self.monitor} -> validation logs no such metric -> "
                f"use one of: {known}"
            )
        value = float(trainer.callback_metrics[self.monitor])
        is_best = trainer.strategy.broadcast(value < self._best)
        if is_best or self._is_due(trainer):
            self.save(trainer, best=value if is_best else None)

    def save(self, trainer: Trainer, best: float | None = None) -> None:
        """Begin to save, on all ranks; nothing if this step is saved already.

        Args:
            trainer: Of the run.
            best: Value of `monitor`, where it is the best so far. `best` is moved before `last`: a
                crash in between repeats the validation rather than lose the best checkpoint.

        Raises:
            FloatingPointError: The run has diverged.
            ValueError: The file system refused this save or the one before.
        """
        if self._saved_step != trainer.global_step:
            self.guard.check(trainer)
            name = f"step-{trainer.global_step:08d}"
            then = partial(self._point_to, name, best)
            trainer.save_checkpoint(self.directory / name, storage_options=then)
        elif best is not None:  # of a validation that a stop had put off
            self.wait(trainer)
            if trainer.is_global_zero:
                self._point_to_best(f"step-{trainer.global_step:08d}", best)
        self._best = self._best if best is None else best
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step

    def wait(self, trainer: Trainer) -> None:
        """Wait until the last save is done; collective."""
        writer_of(trainer).wait()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the last save."""
        self.wait(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Let a save finish that the run's end does not concern."""
        writer_of(trainer).abandon()

    def _is_due(self, trainer: Trainer) -> bool:
        step = trainer.global_step
        if step >= trainer.max_steps:
            return True
        if self.every_steps and step // self.every_steps > self._saved_step // self.every_steps:
            return True
        return "save" in self.vote.granted

    def _is_late(self) -> bool:
        assert self.every_minutes is not None
        return time.monotonic() - self._saved_at > 60 * self.every_minutes

    def _best_value(self) -> float:
        path = self.directory / "best"
        best = json.loads(path.read_text()) if path.exists() else {}
        is_there = best and (self.directory / best["checkpoint"]).is_dir()
        is_comparable = is_there and best.get("metric") == self.monitor
        return best["value"] if is_comparable else float("inf")

    def _point_to(self, name: str, best: float | None) -> None:
        """Move the pointers to a checkpoint that is in its place, and delete what is not kept."""
        if best is not None:
            self._point_to_best(name, best)
        write_atomically(self.directory / "last", name + "\n")
        path = self.directory / "best"
        kept = {name}  # not the highest step after going back to an older checkpoint
        if path.exists():
            kept.add(json.loads(path.read_text())["checkpoint"])
        names = [path.name for path in list_checkpoints(self.directory)]
        for old in superseded(
            names, keep_last=self.keep_last, keep_every_steps=self.keep_every_steps, named=kept
        ):
            remove_checkpoint(self.directory / old)
        if self.max_gib is not None:
            self._make_room(self.max_gib * 2**30, kept)

    def _point_to_best(self, name: str, value: float) -> None:
        entry = {"checkpoint": name, "metric": self.monitor, "value": value}
        write_atomically(self.directory / "best", json.dumps(entry) + "\n")

    def _make_room(self, allowed: float, kept: set[str]) -> None:
        sizes = {path: size_of(path) for path in list_checkpoints(self.directory)}
        for path in [path for path in sizes if path.name not in kept]:
            if sum(sizes.values()) > allowed:
                remove_checkpoint(path)
                del sizes[path]


def superseded(
    names: Sequence[str], *, keep_last: int, keep_every_steps: int | None, named: Container[str]
) -> list[str]:
    """Which checkpoints need not be kept.

    Args:
        names: Of all that are there, oldest first.
        keep_last: Newest ones to keep.
        keep_every_steps: Keep those at multiples of this many steps; None for none.
        named: Those that `last` and `best` name.
    """
    return [
        name
        for name in names[:-keep_last]
        if name not in named
        and not (keep_every_steps and int(name.removeprefix("step-")) % keep_every_steps == 0)
    ]


def writer_of(trainer: Trainer) -> CheckpointDirectory:
    """What writes the checkpoints of a run."""
    writer = trainer.strategy.checkpoint_io
    assert isinstance(writer, CheckpointDirectory)
    return writer


def _set_rates(trainer: Trainer) -> None:
    """Bring rates to where their schedules are: an optimizer without its state has those of 0."""
    for config in trainer.lr_scheduler_configs:
        config.scheduler.last_epoch -= 1
        config.scheduler.step()  # pyright: ignore[reportCallIssue]
