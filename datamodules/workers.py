"""Micro-batches of a rank, made in this process or ahead of time in workers."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from datamodules.meter import Meter, Row
from datamodules.order import Int64Array, Places, RunOrder

PLANNED_SAMPLES = 4096
"""Samples located in one go: numpy's cost per call is then nothing beside its cost per sample."""

_NOTICES = {signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2}
_REQUESTS = {*_NOTICES, signal.SIGTERM}


class SampleSource(Protocol):
    """What a data set offers to the loaders: samples counted by block, made into batches.

    Attributes:
        identity: what a position depends on besides the order: digests and sizes, for the state.
        samples_per_block: int64 [blocks].
        sample_bytes: typical size of a sample in its shard.
    """

    identity: dict[str, Any]
    samples_per_block: Int64Array
    sample_bytes: int

    def expect(self, blocks: Int64Array) -> None:
        """Begin to fetch what some blocks need, in this order, where it is far; does not wait."""
        ...

    def plan(
        self, epochs: Int64Array | None, blocks: Int64Array, samples: Int64Array
    ) -> Int64Array:
        """Resolve samples, by block and number in it, into addresses [n, ...] cheap to read.

        Without epochs it is evaluation, where nothing is random.
        """
        ...

    def batches(self, addresses: Int64Array) -> Iterator[Any]:
        """Read planned micro-batches [batches, micro_batch, ...], several at a time if it pays."""
        ...

    def pad(self, batch: Any, num_samples: int) -> None:
        """Turn the samples of a batch from `num_samples` on into ones that predict nothing."""
        ...

    def count_into(self, row: Row) -> None:
        """Add what is read from now on to a row of `datamodules.meter`."""
        ...


@runtime_checkable
class CountsTargets(Protocol):
    """What a `SampleSource` offers besides where the samples of a batch differ in their targets."""

    def count_targets(
        self, epochs: Int64Array, blocks: Int64Array, samples: Int64Array
    ) -> Int64Array:
        """Count the targets of samples, int64 [n], without reading them."""
        ...


class TrainBatches(IterableDataset):
    """Micro-batches `first` to `last` of a rank; worker w of K makes every K-th from `first + w`.

    `DataLoader` asks its workers in turn, which puts them back in order.

    Batches of a source that `CountsTargets` carry `divisor`, fp32 []: the targets of the optimizer
    step, over all ranks, by the number of its micro-batches. It follows from the order and the
    source alone, so every rank finds it without asking the others.

    Args:
        source: the samples.
        order: where each position's sample is.
        meter: is told what is read; with a row for each worker.
        micro_batch: samples of a batch.
        batch_samples: samples of an optimizer step, over all ranks.
        repeat_after: begin again with the first sample after so many; None never does.
        rank: takes each `world_size`-th position, from itself on.
        world_size: number of ranks.

    Attributes:
        first: number of the rank's first micro-batch to make, since the run began.
        last: number of the one to stop before.
    """

    def __init__(
        self,
        source: SampleSource,
        order: RunOrder,
        meter: Meter,
        *,
        micro_batch: int,
        batch_samples: int,
        repeat_after: int | None,
        rank: int,
        world_size: int,
    ) -> None:
        self._source, self._order, self._meter = source, order, meter
        self._batch_samples = batch_samples
        self._repeat_after, self._micro_batch = repeat_after, micro_batch
        self._rank, self._world_size = rank, world_size
        self.first = self.last = 0

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        process, step = (worker.id, worker.num_workers) if worker else (0, 1)
        self._source.count_into(self._meter.row(process))
        for places, divisors in self._places(self.first + process, step):
            addresses = self._source.plan(places.epochs, places.blocks, places.samples)
            addresses = addresses.reshape(-1, self._micro_batch, *addresses.shape[1:])
            padding = _count_padding(places, self._micro_batch)
            batches = self._source.batches(addresses)
            for number, (batch, num_padding) in enumerate(zip(batches, padding, strict=True)):
                if num_padding:
                    self._source.pad(batch, self._micro_batch - num_padding)
                if divisors is not None:
                    batch["divisor"] = divisors[number]
                yield batch

    def _places(self, first: int, step: int) -> Iterator[tuple[Places, list[Tensor] | None]]:
        """Locate every `step`-th micro-batch from `first` on, several at a time, one time ahead."""
        planned = max(1, PLANNED_SAMPLES // self._micro_batch) * step
        ahead = None
        for start in range(first, self.last, planned):
            numbers = np.arange(start, min(start + planned, self.last), step)
            found = self._locate(numbers)
            self._source.expect(found.blocks)
            if ahead is not None:
                yield ahead
            ahead = found, self._divisors(numbers)
        if ahead is not None:
            yield ahead

    def _locate(self, numbers: Int64Array) -> Places:
        # The A micro-batches of a step on one rank follow each other, so numbering the rank's
        # samples through and spreading them by the world size gives the position in the run.
        own = numbers[:, None] * self._micro_batch + np.arange(self._micro_batch)
        return self._locate_positions(own * self._world_size + self._rank)

    def _locate_positions(self, positions: Int64Array) -> Places:
        positions = positions.reshape(-1)
        if self._repeat_after is not None:
            positions = positions % self._repeat_after
        return self._order.locate(positions)

    def _divisors(self, numbers: Int64Array) -> list[Tensor] | None:
        """Mean targets of a micro-batch in the steps that micro-batches, int64 [n], are part of."""
        if not isinstance(self._source, CountsTargets):
            return None
        accumulation = self._batch_samples // (self._micro_batch * self._world_size)
        steps, step_of = np.unique(numbers // accumulation, return_inverse=True)
        of_step = np.arange(self._batch_samples)
        places = self._locate_positions(steps[:, None] * self._batch_samples + of_step)
        counts = self._source.count_targets(places.epochs, places.blocks, places.samples)
        if places.is_padding is not None:
            counts = np.where(places.is_padding, 0, counts)
        means = counts.reshape(len(steps), -1).sum(1) / (accumulation * self._world_size)
        return [torch.tensor(mean, dtype=torch.float32) for mean in means[step_of].tolist()]


def _count_padding(places: Places, micro_batch: int) -> list[int]:
    """Samples of each micro-batch that only fill it up; they are its last ones."""
    if places.is_padding is None:
        return [0] * (len(places.blocks) // micro_batch)
    return places.is_padding.reshape(-1, micro_batch).sum(1).tolist()


def open_batches(batches: TrainBatches, num_workers: int) -> Any:
    """Give the batches themselves, or a `DataLoader` that makes them in worker processes."""
    if num_workers == 0:
        return batches
    return DataLoader(
        batches,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        worker_init_fn=_begin,
    )


def _as_it_is(batch: Any) -> Any:
    """Take the place of DataLoader's own conversion, which batches made here would not see."""
    return batch


@contextmanager
def quiet_start() -> Iterator[None]:
    """Hold requests to stop back while worker processes are started, which inherit that.

    This process gets them afterwards; a worker once it knows what to do about them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _REQUESTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(worker: int) -> None:
    """End with the parent, however it ends, and with nobody else."""
    _quiet_signals()
    threading.Thread(target=_follow_parent, daemon=True).start()


def _quiet_signals() -> None:
    """Leave a request to stop to the training loop, which still needs batches to end its step.

    Launchers and terminals signal whole process groups, workers included. SIGTERM counts only from
    the parent: multiprocessing sends it at exit, and waits.
    """
    for number in _NOTICES:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS has none, and no launchers of this kind
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, daemon=True).start()
    else:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _NOTICES)


def _obey_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _follow_parent() -> None:
    """Leave when the parent is gone; `DataLoader` looks for it between two batches only."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
