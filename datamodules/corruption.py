"""Objectives for text: a row of tokens becomes a source, and a target that it lacks.

Legend: n rows of a batch, L tokens of a row as it is stored, S and T tokens of source and target,
C corrupted tokens of a row, K spans of them.

`span_corruption` (Raffel et al. 2020, arXiv:1910.10683, section 3.1.4): spans are taken out of the
row; the source has sentinel k in the place of span k, the target is each sentinel and the span it
stands for, and both end with the end token. The spans are those of T5's `random_spans_noise_mask`:
C and K follow from L, the C tokens are partitioned into K spans at random, so are the other L - C,
and the two alternate, uncorrupted text first. Figure 2 of the paper ends a target with one more
sentinel; T5's code, which this follows, does not.

`prefix_lm` (section 3.2.1; T5's `random_prefix_noise_mask`): the source is a prefix of the row, of
1 to L - 1 tokens, each as likely; the target is the rest. Both end with the end token.

Everything random about a row comes from its key alone.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from datamodules.order import Int64Array, UInt64Array, splitmix64

SPAN_CORRUPTION, PREFIX_LM = OBJECTIVES = ("span_corruption", "prefix_lm")


class Corrupted(NamedTuple):
    """Sources and targets of rows, padded by whatever there is.

    Attributes:
        source: int64 [n, S].
        source_lengths: int64 [n].
        target: int64 [n, T].
        target_lengths: int64 [n].
    """

    source: Int64Array
    source_lengths: Int64Array
    target: Int64Array
    target_lengths: Int64Array


class Objective(Protocol):
    """What is taken out of rows.

    Attributes:
        identity: what a corruption depends on besides keys, for the stream's state.
    """

    identity: dict[str, Any]

    def count_targets(self, keys: UInt64Array) -> Int64Array:
        """Count the targets of rows by their keys, uint64 [n]; int64 [n]."""
        ...

    def corrupt(self, tokens: Int64Array, keys: UInt64Array) -> Corrupted:
        """Corrupt rows, int64 [n, L], by their keys, uint64 [n]."""
        ...


def count_noise(row_length: int, density: float, mean_span: float) -> tuple[int, int]:
    """Give C and K of a row of L tokens, as T5's `random_spans_noise_mask` does.

    But there are never more spans than tokens between them.
    """
    num_noise = min(max(round(row_length * density), 1), row_length - 1)
    num_spans = max(round(num_noise / mean_span), 1)
    return num_noise, min(num_spans, row_length - num_noise)


def lengths_for(source_length: int, density: float, mean_span: float) -> tuple[int, int]:
    """Give L, and the target's T, for sources of S tokens; T5's `random_spans_helper`.

    Args:
        source_length: S, sentinels and end token among them.
        density: C / L.
        mean_span: C / K.

    Returns:
        The largest L whose source has S tokens at most, and T: 568 and 114 for 512, 0.15 and 3.

    Raises:
        ValueError: no row fits, or a value is impossible.
    """
    if not 0 < density < 1:
        raise ValueError(
            f"datamodule.noise_density={density} -> it is the share of tokens that are taken out "
            "-> use a number between 0 and 1"
        )
    if not mean_span >= 1:
        raise ValueError(
            f"datamodule.mean_span_length={mean_span} -> a span has a token at least -> use 1 or "
            "more"
        )

    def lengths(row_length: int) -> tuple[int, int]:
        num_noise, num_spans = count_noise(row_length, density, mean_span)
        return row_length - num_noise + num_spans + 1, num_noise + num_spans + 1

    row_length = 2
    if lengths(row_length)[0] > source_length:
        raise ValueError(
            f"datamodule.source_length={source_length} -> a token, a sentinel and an end token are "
            f"{lengths(row_length)[0]} -> use that many at least"
        )
    while lengths(row_length + 1)[0] <= source_length:
        row_length += 1
    return row_length, lengths(row_length)[1]


class SpanCorruption:
    """Rows of L tokens with spans taken out; an `Objective`.

    Args:
        row_length: L.
        density: C / L.
        mean_span: C / K.
        sentinels: their numbers, the first span's first.
        end_token: that both sides end with.

    Raises:
        ValueError: there are fewer sentinels than spans.
    """

    def __init__(
        self,
        row_length: int,
        *,
        density: float,
        mean_span: float,
        sentinels: Sequence[int],
        end_token: int,
    ) -> None:
        self._num_noise, self._num_spans = count_noise(row_length, density, mean_span)
        if len(sentinels) < self._num_spans:
            raise ValueError(
                f"corpus.num_sentinels={len(sentinels)} -> span corruption of rows of {row_length} "
                "tokens, as datamodule.source_length, noise_density and mean_span_length have it, "
                f"takes out {self._num_spans} spans -> set corpus.num_sentinels={self._num_spans} "
                "or more"
            )
        self._row_length, self._end_token = row_length, end_token
        self._sentinels = np.array(sentinels)
        self.identity: dict[str, Any] = {
            "objective": SPAN_CORRUPTION,
            "noise_tokens": self._num_noise,
            "noise_spans": self._num_spans,
        }

    def count_targets(self, keys: UInt64Array) -> Int64Array:
        """As `Objective`; the same for every row."""
        return np.full(len(keys), self._num_noise + self._num_spans + 1)

    def corrupt(self, tokens: Int64Array, keys: UInt64Array) -> "Corrupted":
        """As `Objective`."""
        is_noise = self.find_noise(keys)
        begins = np.ones_like(is_noise)
        np.not_equal(is_noise[:, 1:], is_noise[:, :-1], out=begins[:, 1:])
        # Text k and span k begin one after the other, at begins 2k and 2k + 1 of a row.
        sentinels = self._sentinels[(np.cumsum(begins, axis=1) - 1) // 2]
        source = self._keep(np.where(is_noise, sentinels, tokens), begins | ~is_noise)
        target = self._keep(np.where(is_noise, tokens, sentinels), begins | is_noise)
        return Corrupted(source, self._count(source), target, self._count(target))

    def find_noise(self, keys: UInt64Array) -> NDArray[np.bool_]:
        """Tell which tokens of rows are taken out, by their keys, uint64 [n]; bool [n, L]."""
        num_noise, num_spans = self._num_noise, self._num_spans
        counters = splitmix64(np.arange(self._row_length - 2, dtype=np.uint64))
        draws = splitmix64(counters ^ keys[:, None])
        noise = _partition(draws[:, : num_noise - 1], num_spans)
        text = _partition(draws[:, num_noise - 1 :], num_spans)
        # Before text k are k spans, before span k are k + 1 texts.
        flips = np.zeros((len(keys), self._row_length), np.int8)
        rows = np.arange(len(keys))[:, None]
        flips[rows, text[:, 1:] + noise[:, 1:]] = 1
        next_text = np.pad(
            text[:, 1:], ((0, 0), (0, 1)), constant_values=self._row_length - num_noise
        )
        flips[rows, next_text + noise] = 1
        return np.bitwise_xor.accumulate(flips, axis=1).view(np.bool_)

    def _keep(self, values: NDArray, kept: NDArray[np.bool_]) -> Int64Array:
        """Leave out of rows [n, L] what is not kept, as many in each, and end them."""
        rows = values[kept].reshape(len(values), -1)
        return np.pad(rows, ((0, 0), (0, 1)), constant_values=self._end_token)

    @staticmethod
    def _count(rows: Int64Array) -> Int64Array:
        return np.full(len(rows), rows.shape[1])


def _partition(draws: UInt64Array, num_parts: int) -> Int64Array:
    """Cut items into parts of one or more, every way as likely; T5's `_random_segmentation`.

    Args:
        draws: uint64 [n, items - 1], distinct in a row: a cut is before item i + 1 where draw i is
            among the smallest.
        num_parts: of each row.

    Returns:
        int64 [n, parts], the first item of each part.
    """
    firsts = np.zeros((len(draws), num_parts), np.int64)
    if num_parts > 1:
        largest = np.partition(draws, num_parts - 2, axis=1)[:, num_parts - 2]
        cuts = np.nonzero(draws <= largest[:, None])[1]
        firsts[:, 1:] = cuts.reshape(len(draws), -1) + 1
    return firsts


class PrefixLM:
    """Rows of L tokens cut in two; an `Objective`.

    Args:
        row_length: L, of which a source has at most as many tokens, and a target too.
        end_token: that both sides end with.
    """

    def __init__(self, row_length: int, *, end_token: int) -> None:
        self._row_length, self._end_token = row_length, end_token
        self.identity: dict[str, Any] = {"objective": PREFIX_LM}

    def count_targets(self, keys: UInt64Array) -> Int64Array:
        """As `Objective`."""
        return self._row_length - self._prefixes(keys) + 1

    def corrupt(self, tokens: Int64Array, keys: UInt64Array) -> "Corrupted":
        """As `Objective`."""
        prefixes = self._prefixes(keys)
        nothing = np.zeros_like(prefixes)
        source, source_lengths = self._slice(tokens, nothing, prefixes)
        target, target_lengths = self._slice(tokens, prefixes, self._row_length - prefixes)
        return Corrupted(source, source_lengths, target, target_lengths)

    def _prefixes(self, keys: UInt64Array) -> Int64Array:
        """Tokens of the prefix of each row, int64 [n], 1 to L - 1."""
        return 1 + (splitmix64(keys) % np.uint64(self._row_length - 1)).astype(np.int64)

    def _slice(
        self, tokens: Int64Array, starts: Int64Array, counts: Int64Array
    ) -> tuple[Int64Array, Int64Array]:
        """Take `counts[i]` tokens of row i from `starts[i]` on, and end them."""
        columns = np.arange(int(counts.max()) + 1)
        places = np.minimum(starts[:, None] + columns, self._row_length - 1)
        taken = np.take_along_axis(tokens, places, axis=1)
        return np.where(columns < counts[:, None], taken, self._end_token), counts + 1
