"""Stopping at a step boundary when the system asks for it."""

import signal
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.optimizer import do_nothing_closure

from trainers.callbacks.checkpointing import Checkpointing
from trainers.callbacks.step_vote import StepVote

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class PreemptedError(Exception):
    """The run was asked to stop; it has saved and can be continued by the same command."""


class Preemption(Callback):
    """Turns SIGTERM, SIGUSR1 and Ctrl-C into one save at the next optimizer step, on all ranks.

    The handler sets a flag; after every optimizer step the ranks agree on it (`StepVote`),
    save together, and leave by `PreemptedError`. A second Ctrl-C ends the process at once; a
    second SIGTERM does not, since schedulers signal every process and the agent forwards it again.
    """

    def __init__(self, checkpointing: Checkpointing, vote: StepVote):
        """Take the callbacks that save and that tell the other ranks."""
        self.checkpointing, self.vote = checkpointing, vote
        vote.questions["stop"] = lambda: self.signal_name is not None
        self.signal_name: str | None = None
        self._previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handlers; here, because Lightning installs its own before.

        Lightning's way of agreeing on a signal, a broadcast and a wait for the device before every
        micro-batch, is then of no use.
        """
        signals = trainer._signal_connector
        if signals.received_sigterm:
            self.signal_name, signals.received_sigterm = "SIGTERM", False
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = do_nothing_closure
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
        self.checkpointing.wait(trainer)
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
        return "stop" in self.vote.granted

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
