"""When a run saves, what it keeps, and how it is picked up again."""

import json
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from trainers.callbacks.step_guard import StepGuard
from trainers.callbacks.step_vote import StepVote
from trainers.checkpoint import list_checkpoints, remove_leftovers, write_atomically


class Checkpointing(Callback):
    """Saves at optimizer-step boundaries: every so often, at the best validation, and at the end.

    `last` names the newest checkpoint and moves only when its bytes are durable; `best` names the
    one with the lowest `monitor`. Where validation is due at the same step, saving waits for it, so
    that a resumed run neither repeats nor misses a validation.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        every_steps: int | None,
        every_minutes: float | None,
        keep_last: int,
        keep_every_steps: int | None,
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
            monitor: Validation metric, lower is better, that decides `best`.
            guard: Knows whether what would be saved is worth it.
            vote: Makes the clock of any rank the clock of all.
        """
        self.directory = Path(directory)
        self.every_steps = every_steps
        self.every_minutes = every_minutes
        self.keep_last = keep_last
        self.keep_every_steps = keep_every_steps
        self.monitor = monitor
        self.guard = guard
        self.vote = vote
        if every_minutes is not None:
            vote.questions["save"] = self._is_late
        self._saved_at = time.monotonic()
        self._saved_step = 0
        self._validation_pending = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tidy up after a crash, and count from here."""
        if trainer.is_global_zero:
            remove_leftovers(self.directory)
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
        """
        loops = checkpoint["loops"]["fit_loop"]
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
        is_best = trainer.strategy.broadcast(value < self._best_value())
        if is_best or self._is_due(trainer):
            self.save(trainer, best=value if is_best else None)

    def save(self, trainer: Trainer, best: float | None = None) -> None:
        """Save now, on all ranks; nothing if this step is saved already.

        Args:
            trainer: Of the run.
            best: Value of `monitor`, where it is the best so far. `best` is moved before `last`: a
                crash in between repeats the validation rather than lose the best checkpoint.

        Raises:
            FloatingPointError: The run has diverged.
        """
        if self._saved_step != trainer.global_step:
            self.guard.check(trainer)
            name = _name(trainer)
            trainer.save_checkpoint(self.directory / name)
            if trainer.is_global_zero:
                if best is not None:
                    entry = {"checkpoint": name, "metric": self.monitor, "value": best}
                    write_atomically(self.directory / "best", json.dumps(entry) + "\n")
                write_atomically(self.directory / "last", name + "\n")
                self._forget_old(trainer)
            trainer.strategy.barrier("checkpoint")
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step

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
        best = self.directory / "best"
        return json.loads(best.read_text())["value"] if best.exists() else float("inf")

    def _forget_old(self, trainer: Trainer) -> None:
        best = self.directory / "best"
        kept = {_name(trainer)}  # not the highest step after going back to an older checkpoint
        if best.exists():
            kept.add(json.loads(best.read_text())["checkpoint"])
        checkpoints = list_checkpoints(self.directory)
        for path in checkpoints[: -self.keep_last]:
            step = int(path.name.removeprefix("step-"))
            is_kept = self.keep_every_steps and step % self.keep_every_steps == 0
            if path.name not in kept and not is_kept:
                trainer.strategy.checkpoint_io.remove_checkpoint(path)


def _name(trainer: Trainer) -> str:
    return f"step-{trainer.global_step:08d}"
