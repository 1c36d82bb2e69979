"""Packed rows: whole documents side by side in rows of T, planned from their lengths alone.

Legend: B rows of a batch, T predicted tokens of a row, n tokens of a document with its end token.

A document takes n places of a row: its inputs are the end token before it and all of its tokens but
the last, its targets all of its tokens, so that every token is predicted once. One that is longer
than T is cut into pieces of T and a rest. Documents of a window, consecutive ones of a shard, are
packed best-fit decreasing (Johnson 1973, "Near-optimal bin packing algorithms"; for training rows
Ding et al. 2024, arXiv:2404.10830): the longest first, each into the fullest row that has room.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from datamodules.batch import IGNORED, TextBatch
from datamodules.block_cache import BlockCache
from datamodules.chunks import TokenChunks, any_chunk
from datamodules.index import Index, digest_bytes, write_atomically
from datamodules.meter import Counter, Row, new_row
from datamodules.order import Int64Array
from datamodules.reader import RAISE, BadSamples

WINDOW_DOCUMENTS = 8192
"""Documents that are packed together: more fill hardly better and are read from further apart."""

_CACHED_WINDOWS = 256
"""Plans at hand, for the windows that a shuffle mixes at a time; one is some 200 KiB."""


@dataclass(frozen=True)
class Packing:
    """Rows of a window. Segment s is `tokens[start[s] : start[s] + length[s]]` of the window.

    Attributes:
        first: int64 [rows + 1], first segment of each row, and the number of segments.
        start: int64 [segments].
        length: int64 [segments].
    """

    first: Int64Array
    start: Int64Array
    length: Int64Array


def pack(lengths: NDArray, capacity: int) -> Packing:
    """Pack documents that lie behind each other into rows, best-fit decreasing.

    Args:
        lengths: tokens of each document, integers [documents].
        capacity: T.
    """
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    num_pieces = -(-lengths.astype(np.int64) // capacity)
    document = np.repeat(np.arange(len(lengths)), num_pieces)
    piece = np.arange(len(document)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    start = starts[document] + piece * capacity
    length = np.minimum(lengths[document] - piece * capacity, capacity)
    row = _fit(length, capacity)
    by_row = np.argsort(row, kind="stable")
    first = np.concatenate([[0], np.cumsum(np.bincount(row))])
    return Packing(first, start[by_row], length[by_row])


def _fit(lengths: Int64Array, capacity: int) -> Int64Array:
    """Row of each segment; int64 [segments]."""
    rows = np.empty(len(lengths), np.int64)
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by what room they have
    rooms, num_rows = 0, 0  # bit r of `rooms`: some row has room for r
    order = np.argsort(-lengths, kind="stable")
    for segment, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
        else:
            row, room = num_rows, capacity
            num_rows += 1
        rows[segment] = row
        if left := room - length:
            open_rows[left].append(row)
            rooms |= 1 << left
    return rows


class PackedRows:
    """Packed rows of a data set of token chunks; a `datamodules.workers.SampleSource`.

    Batches have `documents`, numbered from 0 in each row, by which models mask attention and let
    positions begin again; what no document fills is a document of its own, without targets.

    Args:
        index: of the data set.
        sequence_length: T.
        end_token: number of the token that ends a document.
        bad_samples: what to do about chunks that cannot be read. Tokens of the chunk that stands
            for another are taken in their place, again from the first where it has fewer.
        cache: of blocks of shards that are not local tars.

    Attributes:
        identity: what a position in these rows depends on, for the stream's state.
        samples_per_block: int64 [windows], rows of each.
        sample_bytes: size of a row in its shard.

    Raises:
        ValueError: the index has no documents.
    """

    def __init__(
        self,
        index: Index,
        *,
        sequence_length: int,
        end_token: int,
        bad_samples: BadSamples = RAISE,
        cache: BlockCache | None = None,
    ) -> None:
        self._length, self._end_token = sequence_length, end_token
        self._chunks = TokenChunks(index, bad_samples, cache, any_chunk)
        self._documents = index.documents
        if not len(index.documents):
            raise ValueError(
                f"datamodule.packing=best_fit -> {index.path} has no lengths of documents to plan "
                "rows from -> use packing=cut, or prepare the corpus again"
            )
        self._lay_windows(index)
        self.samples_per_block: Int64Array = self._count_rows(index)
        self.sample_bytes = sequence_length * self._chunks.dtype.itemsize
        self.identity: dict[str, Any] = {
            "index_digest": index.digest,
            "sequence_length": sequence_length,
            "packing": digest_bytes(self.samples_per_block.tobytes())[:12],
        }
        self._plans: OrderedDict[int, Packing] = OrderedDict()
        self._row = new_row()

    def count_into(self, row: Row) -> None:
        """Add what is read from now on to a row of `datamodules.meter`."""
        self._row = row
        self._chunks.reader.count_into(row)

    def expect(self, blocks: Int64Array) -> None:
        """Begin to fetch some windows, int64 [n], in this order, where they are not local."""
        self._chunks.expect(blocks, self._tokens_of)

    def plan(
        self, epochs: Int64Array | None, blocks: Int64Array, samples: Int64Array
    ) -> Int64Array:
        """Resolve rows into (window, row in it), int64 [n, 2]; the same in every epoch."""
        return np.stack([blocks, samples], axis=1)

    def batches(self, addresses: Int64Array) -> Iterator[TextBatch]:
        """Read planned rows [batches, B, 2] into batches."""
        for rows in addresses:
            shape = len(rows), self._length
            inputs = np.full(shape, self._end_token, np.int64)
            targets = np.full(shape, IGNORED, np.int64)
            documents = np.zeros(shape, np.int32)
            for place, (window, row) in enumerate(rows.tolist()):
                self._fill(window, row, inputs[place], targets[place], documents[place])
            self._row[Counter.SAMPLES] += len(rows)
            yield TextBatch(
                inputs=torch.from_numpy(inputs),
                targets=torch.from_numpy(targets),
                documents=torch.from_numpy(documents),
            )

    def pad(self, batch: TextBatch, num_samples: int) -> None:
        """Turn the rows from `num_samples` on into ones that predict nothing."""
        batch["targets"][num_samples:] = IGNORED

    def _lay_windows(self, index: Index) -> None:
        """Cut the documents of each shard into windows, and say where each lies."""
        lengths = index.documents
        bounds, first = [0], 0
        for shard in index.shards:
            num_windows = -(-shard.num_documents // WINDOW_DOCUMENTS)
            bounds += [
                first + (number + 1) * shard.num_documents // num_windows
                for number in range(num_windows)
            ]
            first += shard.num_documents
        self._window_start = np.array(bounds[:-1])
        self._window_stop = np.array(bounds[1:])
        sizes = [lengths[start:stop].sum(dtype=np.int64) for start, stop in pairwise(bounds)]
        self._token_start = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        shard_tokens = _sum_by_shard(index)
        self._shard_starts = set((np.cumsum(shard_tokens) - shard_tokens).tolist())

    def _count_rows(self, index: Index) -> Int64Array:
        """Rows of each window, int64 [windows]; counted once per data set and T, beside its index.

        Packing takes 2 us a document, and its result is a few bytes for each window.
        """
        path = index.path / f"packed-{self._length}-{index.digest[:12]}.u32"
        num_windows = len(self._window_start)
        if path.exists() and path.stat().st_size == 4 * num_windows:
            return np.fromfile(path, "<u4").astype(np.int64)
        counts = np.array([len(self._pack(window).first) - 1 for window in range(num_windows)])
        with suppress(OSError):  # a folder that others own: counted again next time
            write_atomically(path, counts.astype("<u4").tobytes())
        return counts

    def _tokens_of(self, window: int) -> tuple[int, int]:
        return int(self._token_start[window]), int(self._token_start[window + 1])

    def _pack(self, window: int) -> Packing:
        documents = self._documents[self._window_start[window] : self._window_stop[window]]
        return pack(documents.astype(np.int64), self._length)

    def _planned(self, window: int) -> Packing:
        if (plan := self._plans.get(window)) is None:
            plan = self._plans[window] = self._pack(window)
            if len(self._plans) > _CACHED_WINDOWS:
                self._plans.popitem(last=False)
        return plan

    def _fill(
        self, window: int, row: int, inputs: NDArray, targets: NDArray, documents: NDArray
    ) -> None:
        plan, first_token = self._planned(window), int(self._token_start[window])
        place = 0
        segments = range(int(plan.first[row]), int(plan.first[row + 1]))
        for number, segment in enumerate(segments):
            start, length = first_token + int(plan.start[segment]), int(plan.length[segment])
            stop = place + length
            # The token before a document is the end of another; before a piece, of the piece.
            has_before = start not in self._shard_starts
            tokens = self._tokens(start - has_before, start + length)
            targets[place:stop] = tokens[has_before:]
            inputs[place + 1 - has_before : stop] = tokens[:-1]
            documents[place:stop] = number
            place = stop
        documents[place:] = len(segments)
        self._row[Counter.BYTES] += place * self._chunks.dtype.itemsize

    def _tokens(self, start: int, stop: int) -> NDArray:
        """Read tokens by their numbers in the data set."""
        parts = []
        chunk = int(np.searchsorted(self._chunks.stops, start, side="right"))
        while start < stop:
            end = int(self._chunks.stops[chunk])
            chunk_start = int(self._chunks.stops[chunk - 1]) if chunk else 0
            parts.append(self._slice(chunk, start - chunk_start, min(stop, end) - chunk_start))
            start, chunk = min(stop, end), chunk + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _slice(self, chunk: int, start: int, stop: int) -> NDArray:
        tokens = self._chunks.tokens(chunk)
        if stop <= len(tokens):
            return tokens[start:stop]
        return np.take(tokens, np.arange(start, stop), mode="wrap")  # of a shorter substitute

    def __getstate__(self) -> dict[str, object]:
        """Leave the counters behind, which belong to a process."""
        return {**self.__dict__, "_row": new_row()}


def _sum_by_shard(index: Index) -> Int64Array:
    first, sums = 0, []
    for shard in index.shards:
        sums.append(int(index.lengths[first : first + shard.num_samples].sum(dtype=np.int64)))
        first += shard.num_samples
    return np.array(sums)
