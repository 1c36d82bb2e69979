"""What of a step a rank does alone: the time that no other rank can make longer."""

import time
from collections import deque
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class OwnWork(Callback):
    """Adds up a rank's own time: waiting for its data, its callbacks, its forward pass.

    Ranks meet at the end of each backward pass, so whole steps take all of them equally long. Up to
    there a rank works alone: it waits for its next micro-batch (`seconds_waited` of a datamodule
    that says it), runs what callbacks do before the forward pass, and the forward pass up to the
    first backward pass. On CUDA the forward pass is timed on the device, by events in its stream,
    because the host is ahead of it and knows nothing of a device that is slow.

    A strategy that gathers parameters in the forward pass (`shards_parameters`: ZeRO 3, FSDP) lets
    the ranks meet there too, and the forward pass is left out: a slow device does not show, slow
    data and a slow host do. Likewise where a module itself exchanges something in its forward pass,
    all ranks take as long as the slowest.

    Nothing waits for the device: events are read once they have passed, the last of them at a
    logged step, which has waited for the device already.
    """

    def __init__(self) -> None:
        self._seconds, self._waited_before = 0.0, 0.0
        self._began: float | torch.cuda.Event | None = None
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from here."""
        self.take(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The batch is there; the callbacks after this one have not run yet."""
        self._began = time.perf_counter()

    def begin_forward(self, trainer: Trainer) -> None:
        """The other callbacks have run; said by the last of them that looks at the time."""
        self._end()
        if not trainer.strategy.shards_parameters:  # type: ignore[attr-defined]
            self._began = _now(trainer.strategy.root_device)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """The first backward pass of a micro-batch ends what the rank does alone."""
        self._end()

    def take(self, trainer: Trainer) -> float:
        """Give the seconds since the last call."""
        waited = getattr(trainer.datamodule, "seconds_waited", 0.0)  # type: ignore[attr-defined]
        if self._events:
            self._events[-1][1].synchronize()
        self._read_passed()
        seconds = self._seconds + waited - self._waited_before
        self._seconds, self._waited_before = 0.0, waited
        return seconds

    def _end(self) -> None:
        if isinstance(self._began, torch.cuda.Event):
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._read_passed()  # so that they do not pile up
            self._events.append((self._began, end))
        elif self._began is not None:
            self._seconds += time.perf_counter() - self._began
        self._began = None

    def _read_passed(self) -> None:
        while self._events and self._events[0][1].query():
            begin, end = self._events.popleft()
            self._seconds += begin.elapsed_time(end) / 1e3


def _now(device: torch.device) -> float | torch.cuda.Event:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
