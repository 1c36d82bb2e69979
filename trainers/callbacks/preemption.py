"""Stopping at a step boundary when the system asks for it."""

import signal
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from trainers.callbacks.checkpointing import Checkpointing

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class PreemptedError(Exception):
    """The run was asked to stop; it has saved and can be continued by the same command."""


class Preemption(Callback):
    """Turns SIGTERM, SIGUSR1 and Ctrl-C into one save at the next optimizer step, on all ranks.

    The handler sets a flag; after every optimizer step the ranks agree on it (one reduction of a
    byte), save together, and leave by `PreemptedError`. A second Ctrl-C ends the process at once; a
    second SIGTERM does not, since schedulers signal every process and the agent forwards it again.
    """

    def __init__(self, checkpointing: Checkpointing):
        """Take the callback that saves."""
        self.checkpointing = checkpointing
        self.signal_name: str | None = None
        self._previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handlers; here, because Lightning installs its own before."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Agree, save and leave if any rank was asked to stop."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches or not self._agree(trainer):
            return
        if trainer.global_step >= trainer.max_steps:
            return  # it is done anyway
        self.checkpointing.save(trainer)
        raise PreemptedError(self.signal_name or "a signal to another rank")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give back the handlers of before Lightning and this callback."""
        self._give_back()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give them back also where the run does not end well."""
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _agree(self, trainer: Trainer) -> bool:
        asked = self.signal_name is not None
        return trainer.strategy.reduce_boolean_decision(asked, all=False)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
