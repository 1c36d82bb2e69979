"""Batches from a global order: resumable for training, exactly once for evaluation.

Legend: G samples of one optimizer step over all ranks, A micro-batches of it on one rank, L lanes,
W samples of a window, as in `datamodules.order`.

Rank r of R takes the samples r, r + R, r + 2R, ... of each step. When R divides L these are whole
lanes, so each block is read by about one rank; otherwise the samples are the same and blocks are
read by several ranks.
"""

import logging
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from datamodules.meter import Meter
from datamodules.order import (
    TAILS,
    EpochsOrder,
    GlobalOrder,
    Int64Array,
    RunOrder,
    count_lanes,
)
from datamodules.settings import check_choice
from datamodules.workers import (
    PLANNED_SAMPLES,
    SampleSource,
    TrainBatches,
    open_batches,
    quiet_start,
)

STATE_VERSION = 2

MIXED_SAMPLES = 2**21
"""Bound on the samples that a shuffle mixes at a time, over all lanes, where they are so small that
`window_mb` holds more: permuting them takes 0.2 s and 32 MiB, also at each resume."""

log = logging.getLogger(__name__)


def order_of(
    source: SampleSource,
    *,
    seed: int,
    batch_samples: int,
    window_mb: float,
    tail: str,
    in_blend: bool = False,
) -> EpochsOrder:
    """Give the order of a run over one data set.

    Args:
        source: the samples.
        seed: key of the order.
        batch_samples: G.
        window_mb: budget in MiB for the samples that a shuffle mixes at a time.
        tail: what becomes of an epoch's samples behind its last whole step (`EpochsOrder`).
        in_blend: whether the data set is one of several, so that its epochs are not made of whole
            steps but of as many samples as there are lanes.

    Raises:
        ValueError: the tail is unknown, or to be dropped where it is all there is.
    """
    check_choice("tail", tail, TAILS)
    num_samples = int(source.samples_per_block.sum())
    lanes = count_lanes(batch_samples)
    step = lanes if in_blend else batch_samples
    if tail == "drop" and num_samples < step:
        raise ValueError(
            f"batch_samples={batch_samples} -> the training split has only {num_samples} samples, "
            "not enough for one optimizer step -> lower batch_samples (or batch_tokens), shorten "
            "the samples, take a larger corpus, or set datamodule.tail=carry"
        )
    mixed = min(MIXED_SAMPLES, int(window_mb * 2**20) // source.sample_bytes)
    window = max(1, mixed // lanes)
    order = GlobalOrder(source.samples_per_block, seed=seed, num_lanes=lanes, window=window)
    return EpochsOrder(order, tail=tail, step=step)


class TrainLoader:
    """The whole training run as one iterable of micro-batches, spanning all its epochs.

    Its state methods are not called `state_dict`, so that Lightning's combined loader, which loses
    the state in some orders of calls, leaves them to the datamodule.

    Args:
        source: the samples.
        order: where the sample of each position is.
        batch_samples: G.
        micro_batch: samples per rank and forward.
        max_samples: global samples of the run, a multiple of G.
        num_workers: worker processes; 0 reads in this process.
        repeat_first_batch: give the first G samples again and again, to see a model overfit.
        rank: of this process.
        world_size: number of ranks.

    Attributes:
        position: global samples that have been handed over.
        seconds_waited: time spent waiting for batches since the loader was made.

    Raises:
        ValueError: the batch does not divide.
    """

    def __init__(
        self,
        source: SampleSource,
        order: RunOrder,
        *,
        batch_samples: int,
        micro_batch: int,
        max_samples: int,
        num_workers: int,
        repeat_first_batch: bool,
        rank: int,
        world_size: int,
    ) -> None:
        if batch_samples % (micro_batch * world_size):
            raise ValueError(
                f"batch_samples={batch_samples} -> not a multiple of micro_batch={micro_batch} x "
                f"{world_size} ranks -> change one of the three"
            )
        if order.num_lanes % world_size and rank == 0:
            log.warning(
                "batch_samples=%d gives %d lanes, not a multiple of %d ranks: the data is the "
                "same, but blocks are read by several ranks",
                *(batch_samples, order.num_lanes, world_size),
            )
        self.seconds_waited, self.position, self._handed = 0.0, 0, 0
        self._order, self._num_workers = order, num_workers
        self._accumulation = batch_samples // (micro_batch * world_size)
        self._length = max_samples // batch_samples * self._accumulation
        self._meter = Meter(max(1, num_workers))
        self._batches = TrainBatches(
            source,
            order,
            self._meter,
            micro_batch=micro_batch,
            batch_samples=batch_samples,
            repeat_after=batch_samples if repeat_first_batch else None,
            rank=rank,
            world_size=world_size,
        )
        self._identity = {
            **{"version": STATE_VERSION, "batch_samples": batch_samples},
            **order.identity,
            **source.identity,
        }

    def __len__(self) -> int:
        """Count the micro-batches of the whole run on this rank, not those that remain."""
        return self._length

    @property
    def epochs(self) -> dict[str, float]:
        """Passes over each data set by name, with fractions, up to the next sample."""
        return self._order.epochs(self.position)

    def counters(self) -> dict[str, int]:
        """What has been read for this rank, by whichever process; see `datamodules.meter`."""
        return self._meter.totals()

    def stream_state(self) -> dict[str, Any]:
        """Describe the next sample; JSON, the same on every rank at an optimizer step's end."""
        return {**self._identity, "position": self.position}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue at the sample that a state describes, under any number of ranks and workers.

        Raises:
            ValueError: the state belongs to another stream; the message has both values.
        """
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise ValueError(
                    f"{name}={value} -> the checkpoint's data stream has {name}="
                    f"{state.get(name)}, so the next sample is not defined -> resume with the "
                    "settings and the data it was written with, or start a new run"
                )
        self.position = state["position"]
        self._handed = self.position // self._identity["batch_samples"] * self._accumulation

    def __iter__(self) -> Iterator[Any]:
        """Give the micro-batches that remain; nothing is read before the first is asked for."""
        self._batches.first, self._batches.last = self._handed, self._length
        with quiet_start():
            batches = iter(open_batches(self._batches, self._num_workers))
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.seconds_waited += time.perf_counter() - asked
            if batch is None:
                return
            # The state moves when the batch is handed over, not when a worker read it ahead. In
            # the middle of an accumulation it stays, since partial gradients are not saved.
            self._handed += 1
            steps = self._handed // self._accumulation
            self.position = steps * self._identity["batch_samples"]
            yield batch


class EvaluationLoader:
    """Every sample once, in the order of the data set, the same number of batches on every rank.

    The last batch is filled up with samples that predict nothing. Reads in this process.

    Args:
        source: the samples.
        micro_batch: samples per rank and forward.
        max_samples: take so many samples, evenly spread over the split; None takes all.
        rank: of this process.
        world_size: number of ranks.
    """

    def __init__(
        self,
        source: SampleSource,
        *,
        micro_batch: int,
        max_samples: int | None,
        rank: int,
        world_size: int,
    ) -> None:
        available = int(source.samples_per_block.sum())
        self.num_samples = available if max_samples is None else min(available, max_samples)
        self._stride = available / self.num_samples
        self._source, self._micro_batch = source, micro_batch
        self._rank, self._world_size = rank, world_size
        self._block_ends = np.cumsum(source.samples_per_block)

    def __len__(self) -> int:
        """Count the micro-batches on each rank."""
        return -(-self.num_samples // (self._micro_batch * self._world_size))

    def __iter__(self) -> Iterator[Any]:
        """Give the batches of one evaluation."""
        for slots, blocks, samples in self._places():
            addresses = self._source.plan(None, blocks, samples)
            addresses = addresses.reshape(*slots.shape, *addresses.shape[1:])
            counts = (slots < self.num_samples).sum(1).tolist()
            for batch, count in zip(self._source.batches(addresses), counts, strict=True):
                self._source.pad(batch, count)
                yield batch

    def _places(self) -> Iterator[tuple[Int64Array, Int64Array, Int64Array]]:
        """Locate the samples of several micro-batches, one time ahead.

        Returns:
            The slots of an evaluation [batches, micro_batch], of which those from `num_samples` on
            are filled with its last sample; the block of each, and its number in it, int64 [n].
        """
        planned, ahead = max(1, PLANNED_SAMPLES // self._micro_batch), None
        for first in range(0, len(self), planned):
            batches = np.arange(first, min(first + planned, len(self)))
            own = batches[:, None] * self._micro_batch + np.arange(self._micro_batch)
            slots = own * self._world_size + self._rank
            samples = np.minimum(slots, self.num_samples - 1).reshape(-1) * self._stride
            samples = samples.astype(np.int64)
            blocks = np.searchsorted(self._block_ends, samples, side="right")
            before = self._block_ends[blocks] - self._source.samples_per_block[blocks]
            self._source.expect(blocks)
            if ahead is not None:
                yield ahead
            ahead = slots, blocks, samples - before
        if ahead is not None:
            yield ahead
