"""Stopping at a step boundary when the system asks for it."""

import signal
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.optimizer import do_nothing_closure

from trainers.callbacks.checkpointing import Checkpointing
from trainers.callbacks.step_vote import StepVote
from trainers.spot_notices import SpotNotices

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

BUDGET, NOTICE = "cluster.budget_minutes", "cluster.notice"
"""Reasons beside the signals: the time of this launch is used up; the machine is taken away."""

LEAVES_FOR_GOOD = {"SIGTERM", "SIGINT"}
"""Reasons after which nobody is to be asked to start the run again: who cancels a job sends
SIGTERM, and who takes its place by preemption sends it too, but starts it again by himself."""


class PreemptedError(Exception):
    """The run was asked to stop; it has saved and can be continued by the same command.

    Attributes:
        asks_requeue: Whether a scheduler should be asked to start the job again; the same on every
            rank, whichever of them was asked to stop.
        is_left_behind: Whether others got SIGTERM and this rank did not: their node may be leaving
            a run that goes on, or about to start all ranks anew with a node that has come.
    """

    def __init__(self, reason: str, *, asks_requeue: bool, is_left_behind: bool):
        super().__init__(reason)
        self.asks_requeue, self.is_left_behind = asks_requeue, is_left_behind


class Preemption(Callback):
    """Turns requests to stop into one save at the next optimizer step, on all ranks.

    Requests are SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C, the end of a budget of time, and the notice
    that this machine will be taken away. Each leaves a mark; after every optimizer step the ranks
    agree on them (`StepVote`), save together, and leave by `PreemptedError`. A second Ctrl-C ends
    the process at once; a second SIGTERM does not, since schedulers signal every process and the
    agent forwards it again. Of several requests to a rank the first counts.

    Args:
        checkpointing: Saves.
        vote: Tells the other ranks.
        ends_at: Time of the clock (`time.time()`) at which the budget is used up; None for none.
        notices: Looks for notices, on the first rank of each machine; None for none.
        ending: Is called when the run ends, one way or another, and requests ask for nothing more.
    """

    def __init__(
        self,
        checkpointing: Checkpointing,
        vote: StepVote,
        *,
        ends_at: float | None,
        notices: SpotNotices | None,
        ending: Callable[[], None],
    ):
        self.checkpointing, self.vote = checkpointing, vote
        self.ends_at, self.notices, self.ending = ends_at, notices, ending
        self.signal_name: str | None = None
        self._reasons = [signal.Signals(number).name for number in STOP_SIGNALS]
        self._reasons += [BUDGET, NOTICE]
        vote.questions |= {reason: partial(self._is_asked_by, reason) for reason in self._reasons}
        self._previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin to look for notices."""
        if self.notices and trainer.local_rank == 0:
            self.notices.start()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handlers; here, because Lightning installs its own before.

        Lightning's way of agreeing on a signal, a broadcast and a wait for the device before every
        micro-batch, is then of no use. Whoever was to hear of signals besides (`launch.deafness`)
        does so no more: from here on they wait for the end of a step.
        """
        signal.set_wakeup_fd(-1)
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
        asked = [reason for reason in self._reasons if reason in self.vote.granted]
        raise PreemptedError(
            " and ".join(asked),
            asks_requeue=not LEAVES_FOR_GOOD & {*asked},
            is_left_behind=asked == ["SIGTERM"] and self.signal_name is None,
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All is trained and saved: hear no more, before Lightning gives its own handlers back."""
        self.ending()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give back the handlers of before Lightning and this callback."""
        self._give_back()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give them back also where the run does not end well."""
        self._give_back()

    def _give_back(self) -> None:
        self.ending()
        if self.notices:
            self.notices.stop()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _agree(self, trainer: Trainer) -> bool:
        return not self.vote.granted.isdisjoint(self._reasons)

    def _is_asked_by(self, reason: str) -> bool:
        if self.signal_name:
            return self.signal_name == reason
        if reason == BUDGET:
            return self.ends_at is not None and time.time() >= self.ends_at
        return reason == NOTICE and self.notices is not None and self.notices.notice is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = self.signal_name or signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
