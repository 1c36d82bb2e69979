"""A run that hangs, or whose ranks are gone, ends with the name of the rank it waits for."""

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from socket import gethostname
from types import FrameType
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from trainers.callbacks.preemption import PreemptedError
from trainers.checkpoint_writer import GivenUpError
from trainers.durable_files import no_room
from trainers.heartbeats import Heartbeats, Record, blame, locate, name_rank

BEAT_S = 1.0
"""Seconds between two signs of life of a rank, and between two looks at the time."""

WAITS_S = 30.0
"""Seconds without progress after which a rank looks whether another one is gone."""

FAREWELL_S = 5.0
"""Most seconds for the others to read the reason: the store may end with rank 0's process."""

TELLING_S = 20.0
"""For printing and writing why, on what may be the cause: a file system that does not answer."""

Report = Callable[[str, int], None]
"""Is told why a run ends, and at which step."""


class Watchdog(Callback):
    """Ends the process when its main thread gets nowhere for `timeout_s`, and says whose fault.

    A thread on every rank writes once a second to torch's store how far its main thread is. Ranks
    that wait for each other all stop; the one furthest behind is the one they wait for, and one
    whose thread is silent too is dead or frozen. The process ends hard, since a main thread in a
    collective cannot be asked; torch's agent ends the other ranks, or they come here themselves.
    For a rank that is silent for a minute nobody waits longer than that.

    The first rank that fails by itself leaves its reason in the store. Those that lose the
    connection to it, or to a rank that was killed, report that reason and not their own, and so do
    those that it leaves alone with a checkpoint.

    Args:
        timeout_s: Seconds that training may take from one sign of progress (a forward pass, a
            backward pass, a step, a validation batch, a save) to the next.
        report: Is told why the run ends, by the rank that knows.
        last_words: Is told why this process is about to end, where nothing else can.
    """

    def __init__(self, *, timeout_s: float, report: Report, last_words: Callable[[str], None]):
        self.timeout_s, self.report, self.last_words = timeout_s, report, last_words
        self._step, self._num_beats = 0, 0
        self._position = [0, 0]  # micro-batch, and signs of progress since it began
        self._doing = "starting"
        self._marked_at = time.monotonic()
        self._has_ended = threading.Event()
        self._beats = Heartbeats(rank=0, num_ranks=1)  # until there is a process group
        self._host: str | None = None

    # -- progress of the main thread ------------------------------------------------------------

    def _mark(self, doing: str, batch: int | None = None) -> None:
        micro_batch, count = self._position
        self._position = [micro_batch, count + 1] if batch is None else [batch, 0]
        self._doing, self._marked_at = doing, time.monotonic()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start to watch: process groups are there, and nothing has been exchanged yet."""
        if stage != "fit":
            return
        self._beats = Heartbeats(trainer.global_rank, trainer.world_size)
        self._host = gethostname() if trainer.num_nodes > 1 else None
        self._mark("starting")
        self._has_ended.clear()
        main_thread = threading.get_ident()
        for work in (self._beat, self._watch):  # apart: who listens must be heard by the others
            threading.Thread(target=work, args=[main_thread], daemon=True).start()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The batch is there."""
        self._step = trainer.global_step + 1
        self._mark("forward pass", batch=batch_idx + 1)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        """The loss is computed."""
        self._mark("backward pass")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gradients are there."""
        self._mark("after the backward pass")

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Gradients are exchanged."""
        self._mark("optimizer step")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """What follows is logging, saving, and the next batch."""
        self._mark("between steps: logging, loading the next batch")

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Validation is a batch further."""
        self._mark(f"validation, batch {batch_idx}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What follows is samples, saving, and the next batch."""
        self._mark("after validation")

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """A checkpoint is about to be written."""
        self._mark("saving")

    def name_of(self, rank: int) -> str:
        """A rank's name for people: with its host, where there are several."""
        return self._beats.name_of(rank)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop watching."""
        self._has_ended.set()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Tell the other ranks, or find out what happened to them, and stop watching."""
        if isinstance(exception, Exception) and not isinstance(exception, PreemptedError):
            with suppress(OSError):  # a full disk: what other callbacks do at the end matters more
                self._explain(trainer, exception)
            self._beats.stay_until_heard(FAREWELL_S)
        self._has_ended.set()

    def _explain(self, trainer: Trainer, error: Exception) -> None:
        if isinstance(error, GivenUpError) and (reason := self._beats.wait_to_be_told()):
            self.report(reason, self._step)
            return
        is_late = "timed out" in str(error).lower()
        if _is_lost_connection(error) and (reason := self._find_cause(is_late)):
            self._beats.tell(reason)
            print(f"error: {reason}", file=sys.stderr, flush=True)
            self.report(reason, self._step)
            return
        reason = str(error)
        if not isinstance(error, FloatingPointError):  # which all ranks find together
            reason = no_room(error) or f"{type(error).__name__}: {reason}"
            reason = f"{self._own_name} failed at step {self._step}: {reason}"
        if self._beats.tell(reason) and trainer.global_rank > 0:  # rank 0 writes its own
            self.report(reason, self._step)

    def _find_cause(self, is_late: bool) -> str | None:
        """What became of another rank: gone, or alive and too late for a collective."""
        if told := self._beats.told():
            return told
        records, silent = self._beats.listen()
        return self._beats.told() or (
            blame(records, silent) if silent or (is_late and records) else None
        )

    # -- the threads ----------------------------------------------------------------------------

    def _beat(self, main_thread: int) -> None:
        while True:
            self._num_beats += 1
            self._beats.publish(self._record(sys._current_frames().get(main_thread)))
            if self._has_ended.wait(BEAT_S):
                return

    def _watch(self, main_thread: int) -> None:
        while not self._has_ended.wait(BEAT_S):
            waited_s = time.monotonic() - self._marked_at
            if waited_s > self.timeout_s or (waited_s > WAITS_S and self._beats.is_one_gone()):
                self._give_up(sys._current_frames().get(main_thread), waited_s)

    def _record(self, frame: FrameType | None) -> Record:
        place, is_waiting = locate(frame)
        return {
            "beat": self._num_beats,
            "position": self._position,
            "step": self._step,
            "doing": self._doing,
            "place": place,
            "is_waiting": is_waiting,
            "host": self._host,
        }

    @property
    def _own_name(self) -> str:
        return name_rank(self._beats.rank, {"host": self._host})

    def _give_up(self, frame: FrameType | None, waited_s: float) -> None:
        """End this process, after telling why: as another rank has told, or as it looks."""
        marked_at = self._marked_at
        reason = self._beats.told()
        records, silent = self._beats.listen()
        if self._has_ended.is_set() or self._marked_at != marked_at:
            return  # it goes on after all
        if reason is None:
            records |= {self._beats.rank: self._record(frame)}
            reason = blame(records, silent)
            if waited_s > self.timeout_s:
                reason = (
                    f"trainer.timeout_s={self.timeout_s:g} -> {reason}; the run has waited for "
                    f"longer than that -> look there, or allow more seconds"
                )
            self._beats.tell(reason)
        # Whatever becomes of that, on a full disk or without a terminal, the process ends.
        telling = threading.Thread(target=self._say, args=[reason, frame], daemon=True)
        telling.start()
        telling.join(TELLING_S)
        self._beats.stay_until_heard(FAREWELL_S)
        os._exit(1)

    def _say(self, reason: str, frame: FrameType | None) -> None:
        for tell in (
            lambda: print(f"error: {reason}\n{self._own_name} stands at:", file=sys.stderr),
            lambda: traceback.print_stack(frame),
            lambda: self.report(reason, self._step),
            lambda: self.last_words(reason),
            lambda: sys.stdout.flush(),
            lambda: sys.stderr.flush(),
        ):
            with suppress(Exception):
                tell()


def _is_lost_connection(error: Exception) -> bool:
    """Whether an error comes from a collective, whose other ranks are gone or late."""
    words = ("gloo", "nccl", "connection", "timed out")
    is_of_collective = any(word in str(error).lower() for word in words)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and is_of_collective
    )
