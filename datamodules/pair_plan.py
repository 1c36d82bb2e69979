"""Which pairs are samples, and which pairs share one: planned from their lengths alone.

Legend: P pairs of a data set, n pairs of a window, S and T tokens of a source and of its target.

Pair i is documents 2i and 2i + 1 of the index. Windows are consecutive pairs of a shard. Without
groups a pair is a sample. With groups a sample is a group: the pairs of a window are sorted by
length, and cut greedily where (longest source + longest target) x pairs would pass the budget.
Cuts depend on the sorted lengths only, so every epoch has the same groups by size; pairs of equal
lengths change places by a key of (seed, epoch, window), so no epoch has the same groups by content.
"""

from collections import OrderedDict
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.index import Index, digest_bytes
from datamodules.order import Int64Array, hash_key, splitmix64

WINDOW_PAIRS = 8192
"""Pairs that are grouped together: with more, groups are hardly fuller and read from further apart.
Below 2^16, so that orders take two bytes a pair."""

LONGER = ("raise", "drop", "cut")
"""What becomes of pairs that are longer than a model's limits."""

_SUMMED_PAIRS = 16
"""Pairs between two known first tokens, which spares 8 bytes of memory for each of the others."""

_CACHED_ORDERS = 4096
"""Orders at hand, for the windows that a shuffle mixes at a time; one is 16 KiB."""

_TIES = 7  # purpose of the key, next to those of `order`, `rows`, `samples` and `blend`


def order_pairs(lengths: Int64Array, key: np.uint64) -> Int64Array:
    """Sort pairs by the longer of the two sides, and those of equal ones by the difference.

    Of the simple orders tried it gives the fullest groups (`docs/log.md`): sorted by one side
    first, groups that reach from one length to the next have both ends of the other side in them.

    Args:
        lengths: int64 [n, 2], S and T of each.
        key: of the order among pairs of equal lengths.

    Returns:
        int64 [n], the pairs in their order; sorted lengths do not depend on the key.
    """
    sources, targets = lengths.T
    ties = splitmix64(np.arange(len(lengths), dtype=np.uint64) ^ key)
    return np.lexsort((ties, targets - sources, np.maximum(sources, targets)))


def cut_groups(lengths: Int64Array, group_tokens: int) -> list[int]:
    """Count the pairs of each group, as many as fit into the budget one after the other.

    Args:
        lengths: int64 [n, 2], S and T of each pair, in order; S + T is at most the budget.
        group_tokens: budget of a group with its padding.
    """
    sizes: list[int] = []
    size = longest_source = longest_target = 0
    for source, target in lengths.tolist():
        longest_source, longest_target = max(longest_source, source), max(longest_target, target)
        size += 1
        if (longest_source + longest_target) * size > group_tokens:
            sizes.append(size - 1)
            size, longest_source, longest_target = 1, source, target
    return [*sizes, size] if size else sizes


class PairPlan:
    """The samples of a data set of pairs, and what is known of them before they are read.

    Args:
        index: of the data set.
        max_source_tokens: of a source, its end token among them.
        max_target_tokens: of a target, likewise.
        longer: what becomes of pairs that pass one of the two: `raise`, `drop` or `cut`.
        group_tokens: padded tokens of a group at most; None makes each pair a sample.
        seed: key of the order among pairs of equal lengths.

    Attributes:
        samples_per_window: int64 [windows].
        window_bounds: int64 [windows + 1], first pair of each window, and P.
        num_dropped: pairs that are left out.
        identity: what a sample depends on, for the stream's state.

    Raises:
        ValueError: there are no pairs or none is left, pairs are too long, or a group has no room
            for the longest.
    """

    def __init__(
        self,
        index: Index,
        *,
        max_source_tokens: int,
        max_target_tokens: int,
        longer: str,
        group_tokens: int | None,
        seed: int,
    ) -> None:
        self._documents, self._group_tokens, self._seed = index.documents, group_tokens, seed
        self._limits = np.array([max_source_tokens, max_target_tokens])
        self.window_bounds = _lay_windows(index)
        self.num_pairs = int(self.window_bounds[-1])
        self._token_sums = self._sum_tokens()
        is_longer = self._find_longer(index, longer)
        dropped = np.flatnonzero(is_longer) if longer == "drop" else np.zeros(0, np.int64)
        self.num_dropped = len(dropped)
        if self.num_dropped == self.num_pairs:
            raise ValueError(
                f"datamodule.longer=drop -> every pair of {index.path} is longer than "
                "datamodule.max_source_tokens or max_target_tokens allow -> raise them"
            )
        self._kept_before = dropped - np.arange(len(dropped))
        self._kept_bounds = self.window_bounds - np.searchsorted(dropped, self.window_bounds)
        self._orders: OrderedDict[tuple[int, int], NDArray[np.uint16]] = OrderedDict()
        self.samples_per_window: Int64Array = np.diff(self._kept_bounds)
        if group_tokens is not None:
            self._check_budget(group_tokens)
            self._cut_windows(group_tokens)
        self.identity: dict[str, Any] = {
            "max_source_tokens": max_source_tokens,
            "max_target_tokens": max_target_tokens,
            "longer": longer,
            "group_tokens": group_tokens,
            "samples": digest_bytes(self.samples_per_window.tobytes())[:12],
        }

    @property
    def tokens_per_sample(self) -> float:
        """Mean, of sources and targets before anything is cut or left out."""
        return int(self._token_sums[-1]) / int(self.samples_per_window.sum())

    def find(
        self, windows: Int64Array, samples: Int64Array, epochs: Int64Array
    ) -> tuple[Int64Array, Int64Array]:
        """Find the pairs of samples, int64 [n] each.

        Args:
            windows: of each sample.
            samples: its number in the window.
            epochs: that it is part of; only groups differ between them.

        Returns:
            The pairs of all samples one after the other, and the number of pairs of each, int64.
        """
        if self._group_tokens is None:
            return self._kept(self._kept_bounds[windows] + samples), np.ones_like(samples)
        groups = self._first_group[windows] + samples
        firsts, sizes = self._first_pair[groups], self._group_sizes[groups]
        rows = zip(windows.tolist(), epochs.tolist(), firsts.tolist(), sizes.tolist(), strict=True)
        parts = []
        for window, epoch, first, size in rows:
            first -= int(self._kept_bounds[window])
            parts.append(self._kept_bounds[window] + self._order(window, epoch)[first:][:size])
        return self._kept(np.concatenate(parts)), sizes

    def count_targets(self, windows: Int64Array, samples: Int64Array) -> Int64Array:
        """Count the targets of samples, int64 [n]; the same in every epoch."""
        if self._group_tokens is not None:
            return self._group_targets[self._first_group[windows] + samples]
        return self.lengths(self._kept(self._kept_bounds[windows] + samples))[:, 1]

    def stored_lengths(self, pairs: Int64Array) -> Int64Array:
        """S and T of pairs, int64 [n], as they are stored; int64 [n, 2]."""
        return self._documents.reshape(-1, 2)[pairs].astype(np.int64)

    def lengths(self, pairs: Int64Array) -> Int64Array:
        """S and T of pairs, int64 [n], as they are given, long ones cut; int64 [n, 2]."""
        return np.minimum(self.stored_lengths(pairs), self._limits)

    def first_tokens(self, pairs: Int64Array) -> Int64Array:
        """Place of the first token of pairs in the data set, int64 [n]; for P that of its end."""
        known, rest = np.divmod(pairs, _SUMMED_PAIRS)
        before = np.arange(2 * _SUMMED_PAIRS)
        places = np.minimum(2 * _SUMMED_PAIRS * known[:, None] + before, len(self._documents) - 1)
        lengths = np.where(before < 2 * rest[:, None], self._documents[places], 0)
        return self._token_sums[known] + lengths.sum(1, dtype=np.int64)

    def tokens_of(self, window: int) -> tuple[int, int]:
        """First token of a window in the data set, and the one that it stops before."""
        first, stop = self.first_tokens(self.window_bounds[window : window + 2]).tolist()
        return first, stop

    def _sum_tokens(self) -> Int64Array:
        """Tokens before each `_SUMMED_PAIRS`-th pair, and all of them at the end."""
        firsts = np.arange(0, len(self._documents), 2 * _SUMMED_PAIRS)
        sums = np.add.reduceat(self._documents, firsts, dtype=np.int64)
        return np.concatenate([[0], np.cumsum(sums)])

    def _find_longer(self, index: Index, longer: str) -> NDArray[np.bool_]:
        """Tell which pairs pass a limit, bool [P]; refuse them if that is asked for."""
        lengths = self._documents.reshape(-1, 2)
        is_longer = lengths > self._limits
        for column, side in enumerate(("source", "target")):
            if longer == "raise" and (count := int(is_longer[:, column].sum())):
                longest = int(lengths[:, column].argmax())
                raise ValueError(
                    f"datamodule.max_{side}_tokens={self._limits[column]} -> {count:,} of "
                    f"{self.num_pairs:,} pairs in {index.path} have a longer {side}, the longest "
                    f"of {lengths[longest, column]:,} tokens with its end token (pair {longest}) "
                    "-> raise it, or set datamodule.longer=drop or cut"
                )
        return is_longer[:, 0] | is_longer[:, 1]

    def _kept(self, numbers: Int64Array) -> Int64Array:
        """Pairs by their number among those that are not dropped."""
        return numbers + np.searchsorted(self._kept_before, numbers, side="right")

    def _lengths_in(self, window: int) -> Int64Array:
        return self.lengths(self._kept(np.arange(*self._kept_bounds[window : window + 2])))

    def _check_budget(self, group_tokens: int) -> None:
        longest = max(
            int(self._lengths_in(window).sum(1).max(initial=0))
            for window in range(len(self.samples_per_window))
        )
        if longest > group_tokens:
            raise ValueError(
                f"datamodule.group_tokens={group_tokens} -> the longest pair alone has {longest} "
                "tokens -> raise it, or lower datamodule.max_source_tokens and max_target_tokens"
            )

    def _cut_windows(self, group_tokens: int) -> None:
        """Plan the groups of all windows, by size."""
        sizes, targets = [], []
        for window in range(len(self.samples_per_window)):
            lengths = self._lengths_in(window)
            lengths = lengths[order_pairs(lengths, np.uint64(0))]
            sizes.append(np.array(cut_groups(lengths, group_tokens), np.int64))
            firsts = np.cumsum(sizes[-1]) - sizes[-1]
            targets.append(np.add.reduceat(lengths[:, 1], firsts) if len(firsts) else firsts)
        self.samples_per_window = np.array([len(own) for own in sizes])
        self._first_group = np.cumsum(self.samples_per_window) - self.samples_per_window
        self._group_sizes, self._group_targets = np.concatenate(sizes), np.concatenate(targets)
        self._first_pair = np.cumsum(self._group_sizes) - self._group_sizes

    def _order(self, window: int, epoch: int) -> NDArray[np.uint16]:
        """Pairs of a window in the order that its groups are cut from."""
        if (order := self._orders.get((window, epoch))) is None:
            key = hash_key(self._seed, epoch, _TIES, window)
            order = order_pairs(self._lengths_in(window), key).astype(np.uint16)
            self._orders[window, epoch] = order
            if len(self._orders) > _CACHED_ORDERS:
                self._orders.popitem(last=False)
        return order


def _lay_windows(index: Index) -> Int64Array:
    """Cut the pairs of each shard into windows of about one size; first pairs, and P."""
    bounds, first = [0], 0
    for shard in index.shards:
        num_pairs, rest = divmod(shard.num_documents, 2)
        if rest or not num_pairs:
            raise ValueError(
                f"data set {index.path}: {shard.num_documents} documents in a shard are no pairs "
                f"-> prepare a corpus of pairs (corpus=pairs) (shard {shard.url})"
            )
        num_windows = -(-num_pairs // WINDOW_PAIRS)
        bounds += [first + (n + 1) * num_pairs // num_windows for n in range(num_windows)]
        first += num_pairs
    assert all(start < stop for start, stop in pairwise(bounds))
    return np.array(bounds)
