"""The global order of samples: a pure function of (seed, epoch), independent of ranks and workers.

Legend: N samples in the data set, G samples of one optimizer step, L lanes, W samples of a window.

Blocks of consecutive samples are permuted, laid end to end as a circle, and cut from a drawn place
on into L lanes of equal size (give or take one sample), so that lanes and windows begin elsewhere
in each epoch, however few blocks there are. Inside a lane, windows of W samples are permuted.
Position p of an epoch is index `p // L` of lane `p % L`. Memory is O(blocks), and any position can
be found directly, which is what makes a resume in the middle of an epoch exact and immediate.
"""

from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]
UInt64Array = NDArray[np.uint64]

TAILS = ("drop", "carry", "pad_mask")
"""What becomes of the samples behind an epoch's last whole step."""

MAX_LANES = 64
"""More lanes would spread every step over more blocks without serving a larger common world."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_MASK = 2**64 - 1


def splitmix64(values: UInt64Array) -> UInt64Array:
    """Hash 64-bit integers, element by element.

    The output function of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom
    number generators", fig. 16). numpy's generators may change between versions; this cannot.

    Args:
        values: uint64, any shape.

    Returns:
        uint64 of the same shape; a bijection of the input.
    """
    mixed = values + _GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX_1
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
    return mixed ^ (mixed >> np.uint64(31))


def hash_key(*parts: int) -> np.uint64:
    """Fold non-negative integers (a seed, an epoch, a purpose) into one 64-bit key."""
    # As `splitmix64`, with integers of Python, which take a thirtieth of the time of small arrays.
    key = 0
    for part in parts:
        key = (key ^ part) + int(_GOLDEN) & _MASK
        key = (key ^ key >> 30) * int(_MIX_1) & _MASK
        key = (key ^ key >> 27) * int(_MIX_2) & _MASK
        key ^= key >> 31
    return np.uint64(key)


def permutation(size: int, key: np.uint64) -> Int64Array:
    """Permute `range(size)` by a stable sort of hashed counters; int64 [size]."""
    return np.argsort(splitmix64(np.arange(size, dtype=np.uint64) ^ key), kind="stable")


def uniform(key: np.uint64, size: int) -> NDArray[np.float64]:
    """Draw numbers in [0, 1) that depend on a key alone; float64 [size], 53 random bits each."""
    draws = splitmix64(splitmix64(np.arange(size, dtype=np.uint64)) ^ key)
    return (draws >> np.uint64(11)).astype(np.float64) * 2.0**-53


def count_lanes(batch_samples: int) -> int:
    """Give L, the largest divisor of the global batch that is at most `MAX_LANES`."""
    return max(lanes for lanes in range(1, MAX_LANES + 1) if batch_samples % lanes == 0)


def distinct(epochs: Int64Array) -> list[int]:
    """Give the epochs among those of some samples, ascending; one alone needs no sorting."""
    first, last = int(epochs.min()), int(epochs.max())
    return [first] if first == last else np.unique(epochs).tolist()


class GlobalOrder:
    """Where the sample of each position lies, for any epoch.

    Args:
        samples_per_block: int64 [blocks], samples in each block, in the order of the data set.
        seed: key of every permutation.
        num_lanes: L.
        window: W, in samples.
    """

    _BLOCKS, _WINDOWS, _BEGIN = 1, 2, 4  # purposes, so that no two draws share a key

    def __init__(
        self, samples_per_block: Int64Array, *, seed: int, num_lanes: int, window: int
    ) -> None:
        self.num_samples = int(samples_per_block.sum())
        self.num_lanes = num_lanes
        self.identity = {"seed": seed, "lanes": num_lanes, "window": window}
        self._samples_per_block = samples_per_block
        self._seed, self._window = seed, window
        self._epoch, self._begin = -1, 0
        self._blocks = self._block_ends = np.zeros(0, np.int64)
        # One window per lane is in use at a time, and two while a lane passes from one to the next.
        self._windows: OrderedDict[tuple[int, int], Int64Array] = OrderedDict()

    def locate(self, epoch: int, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Find the samples at some positions of an epoch.

        Args:
            epoch: number of the pass over the data, from 0.
            positions: int64 [n], each in `[0, N)`.

        Returns:
            The block of each sample and the sample's number in its block, both int64 [n].
        """
        self._start_epoch(epoch)
        lane, index = positions % self.num_lanes, positions // self.num_lanes
        window, slot = index // self._window, index % self._window
        group = window * self.num_lanes + lane
        # Sorting brings the positions of one window together, whose permutation is then used once.
        by_group = np.argsort(group, kind="stable")
        groups, slots = group[by_group], slot[by_group]
        starts = np.flatnonzero(np.diff(groups, prepend=-1))
        found = np.empty_like(positions)
        for start, stop in pairwise([*starts.tolist(), len(positions)]):
            window_number, lane_number = divmod(int(groups[start]), self.num_lanes)
            order = self._window_order(lane_number, window_number)
            first = self._lane_start(lane_number) + window_number * self._window
            np.add(order[slots[start:stop]], first, out=found[start:stop])
        place = np.empty_like(positions)
        place[by_group] = found
        place = (place + self._begin) % self.num_samples
        block = np.searchsorted(self._block_ends, place, side="right")
        before = self._block_ends[block] - self._samples_per_block[self._blocks[block]]
        return self._blocks[block], place - before

    def _start_epoch(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        key = hash_key(self._seed, epoch, self._BLOCKS)
        self._blocks = permutation(len(self._samples_per_block), key)
        self._block_ends = np.cumsum(self._samples_per_block[self._blocks])
        self._begin = int(hash_key(self._seed, epoch, self._BEGIN) % np.uint64(self.num_samples))
        self._windows.clear()
        self._epoch = epoch

    def _lane_start(self, lane: int) -> int:
        # The first N % L lanes hold one sample more.
        return lane * (self.num_samples // self.num_lanes) + min(
            lane, self.num_samples % self.num_lanes
        )

    def _window_order(self, lane: int, window: int) -> Int64Array:
        if (order := self._windows.get((lane, window))) is None:
            lane_size = self._lane_start(lane + 1) - self._lane_start(lane)
            size = min(self._window, lane_size - window * self._window)
            key = hash_key(self._seed, self._epoch, self._WINDOWS, lane, window)
            order = self._windows[lane, window] = permutation(size, key)
            if len(self._windows) > 2 * self.num_lanes:
                self._windows.popitem(last=False)
        return order


@dataclass(frozen=True)
class Places:
    """Where the samples of some positions lie.

    Attributes:
        epochs: int64 [n], passes over the data before the one that the sample is part of.
        blocks: int64 [n], its block.
        samples: int64 [n], its number in the block.
        is_padding: bool [n], whether it only fills a step up; None where none does.
    """

    epochs: Int64Array
    blocks: Int64Array
    samples: Int64Array
    is_padding: NDArray[np.bool_] | None = None


class RunOrder(Protocol):
    """The order of a whole run: a pure function of the position since its begin.

    Attributes:
        num_lanes: positions p with equal `p % num_lanes` read neighbouring samples.
        identity: what a position depends on, for the stream's state.
    """

    num_lanes: int
    identity: dict[str, Any]

    def locate(self, positions: Int64Array) -> Places:
        """Find the samples at some positions, int64 [n]."""
        ...

    def epochs(self, position: int) -> dict[str, float]:
        """Passes over each data set by name at a position, with fractions."""
        ...


class EpochsOrder:
    """One data set, epoch after epoch.

    Args:
        order: of an epoch.
        tail: `drop` leaves out the last samples of each epoch's order, different ones each time, so
            that it is made of whole steps; `carry` lets the next epoch begin within a step;
            `pad_mask` fills the last step up with samples that predict nothing.
        step: samples that a whole step has, a multiple of the order's lanes.
    """

    def __init__(self, order: GlobalOrder, *, tail: str, step: int) -> None:
        size = order.num_samples
        sizes = {"drop": size // step * step, "carry": size, "pad_mask": -(-size // step) * step}
        self.num_lanes, self._order = order.num_lanes, order
        self.samples_per_epoch = sizes[tail]
        self.identity = {**order.identity, "tail": tail, "samples_per_epoch": sizes[tail]}

    def locate(self, positions: Int64Array) -> Places:
        """As `RunOrder`."""
        epochs, places = np.divmod(positions, self.samples_per_epoch)
        is_padding = places >= self._order.num_samples
        places = np.minimum(places, self._order.num_samples - 1)
        blocks, samples = np.empty_like(places), np.empty_like(places)
        for epoch in distinct(epochs):
            own = epochs == epoch
            blocks[own], samples[own] = self._order.locate(epoch, places[own])
        return Places(epochs, blocks, samples, is_padding if is_padding.any() else None)

    def epochs(self, position: int) -> dict[str, float]:
        """As `RunOrder`; the one data set has no name."""
        return {"": position / self.samples_per_epoch}
