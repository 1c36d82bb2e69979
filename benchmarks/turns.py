"""Readers that take turns: so many batches or a second, every byte touched, samples counted.

Imported by the processes of other libraries as well, whose environment may hold little more than
numpy, torch and xxhash.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
import xxhash

TURN_SECONDS = 1.0
"""A turn ends here at the latest, so that slow readers do not take all of a benchmark's time."""

DIGEST_BITS = 0xFFFFFFFFFFFFFFFF

Tokens = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Turn:
    """What a reader did when it was asked.

    Attributes:
        seconds: for all of it.
        samples: that it gave.
        epoch_samples: in the last epoch that it finished, which shows a dropped tail; None before.
        epoch_digest: sum of the digests of that epoch's samples.
    """

    seconds: float
    samples: int
    epoch_samples: int | None
    epoch_digest: int | None

    def as_dict(self) -> dict[str, Any]:
        """Its fields, for a line of JSON."""
        return asdict(self)


class Side(Protocol):
    """One of those that are compared."""

    def turn(self, num_batches: int) -> Turn:
        """Read so many batches more, or as many as there is time for."""
        ...


def clocks() -> torch.Tensor:
    """Seconds on the wall's clock and of this process's processors; differences mean something.

    Waits for a CUDA device that was used.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


def use_threads(count: int) -> None:
    """Let torch use so many, also once Lightning has started, which else sets them anew."""
    torch.set_num_threads(count)
    os.environ["OMP_NUM_THREADS"] = str(count)


def touch_tokens(batch: Tokens) -> tuple[int, int]:
    """Add up inputs and targets [B, T]; rows, and the sum."""
    inputs, targets = batch
    return len(inputs), int(inputs.sum()) + int(targets.sum())


def touch_images(batch: list[Any]) -> tuple[int, int]:
    """Hash every sample (XXH3, at memory speed and wherever it lies); samples, sum of digests."""
    return len(batch), sum(map(xxhash.xxh3_64_intdigest, batch))


class Reader:
    """A `Side` in this process: goes on where it stopped, epoch after epoch.

    Args:
        epoch: gives the batches of the next epoch.
        touch: reads every byte of a batch; gives the number of its samples, and a digest.
    """

    def __init__(
        self, epoch: Callable[[], Iterator[Any]], touch: Callable[[Any], tuple[int, int]]
    ) -> None:
        self._epoch, self._touch = epoch, touch
        self._batches = epoch()
        self._samples = self._digest = 0
        self._last: tuple[int | None, int | None] = (None, None)

    def turn(self, num_batches: int) -> Turn:
        """As `Side`."""
        begun, total = time.perf_counter(), 0
        while num_batches and time.perf_counter() < begun + TURN_SECONDS:
            batch = next(self._batches, None)
            if batch is None:
                self._last = self._samples, self._digest & DIGEST_BITS
                self._samples = self._digest = 0
                self._batches = self._epoch()
                continue
            samples, digest = self._touch(batch)
            total, num_batches = total + samples, num_batches - 1
            self._samples, self._digest = self._samples + samples, self._digest + digest
        return Turn(time.perf_counter() - begun, total, *self._last)


def take_turns(sides: dict[str, Side], num_batches: int, rounds: int) -> dict[str, list[Turn]]:
    """Let all sides read in turn, after one turn each that fills caches and is not counted."""
    for side in sides.values():
        side.turn(num_batches)
    turns: dict[str, list[Turn]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            turns[name].append(side.turn(num_batches))
    return turns
