"""Pairs of a data set as samples for the loaders: sources and targets, gathered and padded.

Legend: B pairs of a batch, S and T tokens of its longest source and target, n samples or runs.

A batch is cut out of the shards in few steps, whatever its pairs: the runs of tokens of all of its
sources and targets are copied into one flat array, region by region, and from there into place by
one mask.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from datamodules.batch import IGNORED, PairBatch
from datamodules.block_cache import BlockCache
from datamodules.chunks import READ_TOKENS, TokenChunks, any_chunk
from datamodules.index import Index
from datamodules.meter import Counter, Row, new_row
from datamodules.order import Int64Array
from datamodules.pair_plan import PairPlan
from datamodules.reader import RAISE, BadSamples


class PairRows:
    """The pairs of a data set, alone or in groups; a `datamodules.workers.SampleSource`.

    A micro-batch holds the pairs of all of its samples. A pair of which a part lies in a chunk that
    cannot be read, where that is no error, predicts nothing: tokens of another chunk would be no
    translation, and perhaps of the other vocabulary. It stays counted among the targets.

    Args:
        index: of the data set.
        plan: which pairs are samples.
        start_token: first input of the decoder.
        end_token: last token of a source.
        target_end_token: last token of a target.
        texts: source and target of each pair as written, which batches then carry; None for none.
        bad_samples: what to do about chunks that cannot be read.
        cache: of blocks of shards that are not local tars.

    Attributes:
        identity: what a position in these samples depends on, for the stream's state.
        samples_per_block: int64 [windows].
        sample_bytes: mean size of a sample in its shard.
    """

    def __init__(
        self,
        index: Index,
        plan: PairPlan,
        *,
        start_token: int,
        end_token: int,
        target_end_token: int,
        texts: Sequence[tuple[str, str]] | None = None,
        bad_samples: BadSamples = RAISE,
        cache: BlockCache | None = None,
    ) -> None:
        self._plan, self._texts, self._start_token = plan, texts, start_token
        self._end_tokens = end_token, target_end_token
        self._chunks = TokenChunks(index, bad_samples, cache, any_chunk)
        self._chunk_begins = self._chunks.stops - self._chunks.lengths
        self.samples_per_block: Int64Array = plan.samples_per_window
        self.sample_bytes = max(1, int(plan.tokens_per_sample * self._chunks.dtype.itemsize))
        self.identity: dict[str, Any] = {"index_digest": index.digest, **plan.identity}
        self._last_rows: Int64Array = np.zeros(0, np.int64)
        self._row = new_row()

    def count_into(self, row: Row) -> None:
        """Add what is read from now on to a row of `datamodules.meter`."""
        self._row = row
        self._chunks.reader.count_into(row)

    def expect(self, blocks: Int64Array) -> None:
        """Begin to fetch some windows, int64 [n], in this order, where they are not local."""
        self._chunks.expect(blocks, self._plan.tokens_of)

    def plan(
        self, epochs: Int64Array | None, blocks: Int64Array, samples: Int64Array
    ) -> Int64Array:
        """Resolve samples into (window, sample in it, epoch), int64 [n, 3]."""
        return np.stack([blocks, samples, np.zeros_like(blocks) if epochs is None else epochs], 1)

    def count_targets(
        self, epochs: Int64Array, blocks: Int64Array, samples: Int64Array
    ) -> Int64Array:
        """Count the targets of samples, int64 [n]; the same in every epoch."""
        return self._plan.count_targets(blocks, samples)

    def batches(self, addresses: Int64Array) -> Iterator[PairBatch]:
        """Read planned samples [batches, samples, 3] into batches."""
        num_batches, num_samples, _ = addresses.shape
        together = max(1, int(READ_TOKENS / (num_samples * self._plan.tokens_per_sample)))
        for start in range(0, num_batches, together):
            planned = addresses[start : start + together]
            windows, samples, epochs = planned.reshape(-1, 3).T
            pairs, counts = self._plan.find(windows, samples, epochs)
            lengths = self._plan.lengths(pairs)
            tokens, is_bad = self._read(pairs, lengths)
            token_stops = np.concatenate([[0], np.cumsum(lengths.sum(1))])
            stop = 0
            for rows in np.cumsum(counts.reshape(len(planned), -1), axis=1):
                first, stop = stop, stop + int(rows[-1])
                self._last_rows = rows
                own = slice(first, stop)
                flat = tokens[token_stops[first] : token_stops[stop]]
                batch = self._batch(lengths[own], flat, is_bad[own])
                if self._texts is not None:
                    batch["texts"] = [self._texts[pair] for pair in pairs[own].tolist()]
                self._row[Counter.SAMPLES] += num_samples
                yield batch

    def pad(self, batch: PairBatch, num_samples: int) -> None:
        """Let the samples from `num_samples` on of the batch that was given last predict nothing.

        How many pairs each of its samples has is known of that batch only.
        """
        if num_samples < len(self._last_rows):
            first = int(self._last_rows[num_samples - 1]) if num_samples else 0
            batch["targets"][first:] = IGNORED

    def _batch(self, lengths: Int64Array, flat: NDArray, is_bad: NDArray[np.bool_]) -> PairBatch:
        """Pad pairs of the lengths int64 [B, 2] whose tokens follow each other in `flat`."""
        num_sources, num_targets = lengths.max(0).tolist()
        source_mask = np.arange(num_sources) < lengths[:, :1]
        target_mask = np.arange(num_targets) < lengths[:, 1:]
        no_start = np.zeros((len(lengths), 1), np.bool_)
        # Of a row S sources, the start token, T targets: in the order that they have in `flat`.
        tokens = np.zeros((len(lengths), num_sources + 1 + num_targets), np.int64)
        tokens[np.concatenate([source_mask, no_start, target_mask], axis=1)] = flat
        tokens[:, num_sources] = self._start_token
        targets = np.where(target_mask, tokens[:, num_sources + 1 :], IGNORED)
        if is_bad.any():
            targets[is_bad] = IGNORED
        return PairBatch(
            source=torch.from_numpy(tokens[:, :num_sources].copy()),
            source_mask=torch.from_numpy(source_mask),
            inputs=torch.from_numpy(tokens[:, num_sources:-1].copy()),
            targets=torch.from_numpy(targets),
        )

    def _read(self, pairs: Int64Array, lengths: Int64Array) -> tuple[NDArray, NDArray[np.bool_]]:
        """Copy pairs, int64 [n], cut to the lengths int64 [n, 2], out of the shards.

        Returns:
            Their tokens one after the other, and whether a part of each pair cannot be read.
        """
        firsts = self._plan.first_tokens(pairs)
        stored = self._plan.stored_lengths(pairs)
        runs = np.stack([firsts, firsts + stored[:, 0]], axis=1).reshape(-1)
        tokens, is_bad = self._read_runs(runs, lengths.reshape(-1))
        # What was cut ends as the others do.
        ends = np.cumsum(lengths.reshape(-1)).reshape(-1, 2) - 1
        tokens[ends] = self._end_tokens
        return tokens, is_bad[::2] | is_bad[1::2]

    def _read_runs(
        self, starts: Int64Array, lengths: Int64Array
    ) -> tuple[NDArray, NDArray[np.bool_]]:
        """Copy runs of tokens by their first number in the data set and their length, int64 [n].

        Returns:
            The tokens of all runs one after the other, 0 where they cannot be read; and bool [n],
            whether that is so of a part of each run.
        """
        # A run that a chunk's end divides is several segments.
        first = self._chunks.stops.searchsorted(starts, side="right")
        last = self._chunks.stops.searchsorted(starts + lengths - 1, side="right")
        run, chunks = _spread(first, last - first + 1)
        begins = np.maximum(starts[run], self._chunk_begins[chunks])
        sizes = np.minimum((starts + lengths)[run], self._chunks.stops[chunks]) - begins
        read, regions, region_starts = self._chunks.locate(chunks)
        from_region = region_starts + begins - self._chunk_begins[chunks]
        into_tokens = np.cumsum(sizes) - sizes
        tokens = np.zeros(int(sizes.sum()), self._chunks.dtype)
        is_whole = read == chunks
        by_region = np.flatnonzero(is_whole)[np.argsort(regions[is_whole], kind="stable")]
        bounds = np.flatnonzero(np.diff(regions[by_region], prepend=-1))
        for members in np.split(by_region, bounds[1:]) if len(by_region) else ():
            content = self._chunks.reader.regions.view(int(regions[members[0]]))
            stored = np.frombuffer(content, tokens.dtype, len(content) // tokens.itemsize)
            _, places = _spread(from_region[members], sizes[members])
            if len(members) == len(chunks):
                tokens = stored[places]
            else:
                tokens[_spread(into_tokens[members], sizes[members])[1]] = stored[places]
        self._row[Counter.BYTES] += tokens.nbytes
        is_bad = np.zeros(len(starts), np.bool_)
        is_bad[run[~is_whole]] = True
        return tokens, is_bad

    def __getstate__(self) -> dict[str, object]:
        """Leave the counters behind, which belong to a process."""
        return {**self.__dict__, "_row": new_row()}


def _spread(starts: Int64Array, counts: Int64Array) -> tuple[Int64Array, Int64Array]:
    """List the numbers `starts[i]`, `starts[i] + 1`, ..., `counts[i]` of them for each i.

    Returns:
        The i of each, and the numbers; int64 [sum of counts] each.
    """
    owners = np.repeat(np.arange(len(starts)), counts)
    shifts = starts - (np.cumsum(counts) - counts)
    return owners, np.arange(len(owners)) + shifts[owners]
