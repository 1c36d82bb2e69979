"""Rows of text: slices of the token chunks in shards, as samples for the loaders.

Legend: B rows of a batch, T predicted tokens of a row, n tokens of a chunk.

A chunk holds `(n - 1) // T` rows; row k is `tokens[phase + k*T : phase + k*T + T + 1]`, of which
all but the last are inputs and all but the first targets. In training the phase is drawn anew for
each epoch and chunk from the tokens left over, so that epochs do not cut the text at the same
places. In evaluation it is 0.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from datamodules.batch import IGNORED, TextBatch
from datamodules.block_cache import BlockCache
from datamodules.chunks import READ_TOKENS, TokenChunks
from datamodules.index import Index
from datamodules.meter import Counter, Row, new_row
from datamodules.order import Int64Array, distinct, hash_key, splitmix64
from datamodules.reader import RAISE, BadSamples

_PHASES = 3  # purpose of the key, next to those of `datamodules.order`


class TextRows:
    """The rows of a data set of token chunks; a `datamodules.workers.SampleSource`.

    Args:
        index: of the data set.
        sequence_length: T.
        document_mask: add `documents` to the batches. The token that ends a document opens the
            next one, so it alone is the context that the next document's first token is predicted
            from, and every target stays predictable.
        seed: key of the phases.
        bad_samples: what to do about chunks that cannot be read. Rows of the chunk that stands for
            another are taken in its place, again from the first where it has fewer.
        cache: of blocks of shards that are not local tars.

    Attributes:
        identity: what a position in these rows depends on, for the stream's state.
        samples_per_block: int64 [chunks], rows of each chunk.
        sample_bytes: size of a row in its shard.

    Raises:
        ValueError: no chunk is long enough for a row.
    """

    def __init__(
        self,
        index: Index,
        *,
        sequence_length: int,
        document_mask: bool,
        seed: int,
        bad_samples: BadSamples = RAISE,
        cache: BlockCache | None = None,
    ) -> None:
        self._length, self._document_mask, self._seed = sequence_length, document_mask, seed
        self._chunks = TokenChunks(index, bad_samples, cache, self._has_rows)
        self._dtype = self._chunks.dtype
        lengths = self._chunks.lengths
        self.identity: dict[str, Any] = {
            "index_digest": index.digest,
            "sequence_length": sequence_length,
            "packing": "cut",
        }
        # A chunk may be empty: of white space a tokenizer may make no token.
        self.samples_per_block: Int64Array = np.maximum(lengths - 1, 0) // sequence_length
        self.sample_bytes = sequence_length * self._dtype.itemsize
        if not self.samples_per_block.any():
            raise ValueError(
                f"datamodule.sequence_length={sequence_length} -> no row of so many tokens and "
                f"one more fits in {index.path}, whose longest chunk has {lengths.max()} -> "
                "shorten sequence_length, or take a larger corpus or split"
            )
        self._slack = lengths - 1 - self.samples_per_block * sequence_length
        self._row = new_row()

    def count_into(self, row: Row) -> None:
        """Add what is read from now on to a row of `datamodules.meter`."""
        self._row = row
        self._chunks.reader.count_into(row)

    def expect(self, blocks: Int64Array) -> None:
        """Begin to fetch some chunks, int64 [n], in this order, where they are not local."""
        self._chunks.reader.expect(blocks)

    def plan(
        self, epochs: Int64Array | None, blocks: Int64Array, samples: Int64Array
    ) -> Int64Array:
        """Resolve rows into (region, first token in it, chunk), int64 [n, 3].

        Args:
            epochs: int64 [n], keys of the phases; None for evaluation.
            blocks: int64 [n], the chunk of each row.
            samples: int64 [n], the row's number k in its chunk.
        """
        chunks, regions, starts = self._chunks.locate(blocks)
        # A chunk that stands for another may have fewer rows.
        starts = starts + samples % self.samples_per_block[chunks] * self._length
        if epochs is not None:
            for epoch in distinct(epochs):
                own = epochs == epoch
                key = hash_key(self._seed, epoch, _PHASES)
                draws = splitmix64(chunks[own].astype(np.uint64) ^ key)
                spare = (self._slack[chunks[own]] + 1).astype(np.uint64)
                starts[own] += (draws % spare).astype(np.int64)
        return np.stack([regions, starts, chunks], axis=1)

    def batches(self, addresses: Int64Array) -> Iterator[TextBatch]:
        """Read planned rows [batches, B, 3] into batches."""
        num_batches, num_rows, _ = addresses.shape
        together = max(1, READ_TOKENS // (num_rows * self._length))
        for start in range(0, num_batches, together):
            planned = addresses[start : start + together]
            tokens = self._read(planned.reshape(-1, 3)).reshape(*planned.shape[:2], -1)
            for own_addresses, own_tokens in zip(planned, tokens, strict=True):
                yield self._batch(own_addresses, own_tokens)

    def pad(self, batch: TextBatch, num_samples: int) -> None:
        """Turn the rows from `num_samples` on into ones that predict nothing."""
        if num_samples < len(batch["targets"]):
            # Inputs lie in the same memory.
            batch["targets"] = batch["targets"].clone()
            batch["targets"][num_samples:] = IGNORED

    def _read(self, addresses: Int64Array) -> NDArray:
        """Copy rows out of the shards, [n, T + 1]."""
        regions, starts, _ = addresses.T
        tokens = np.empty((len(addresses), self._length + 1), self._dtype)
        for region in set(regions.tolist()):
            rows = np.flatnonzero(regions == region)
            tokens[rows] = self._every_row(region)[starts[rows]]
        self._row[Counter.SAMPLES] += len(tokens)
        self._row[Counter.BYTES] += tokens.nbytes
        return tokens

    def _batch(self, addresses: Int64Array, tokens: NDArray) -> TextBatch:
        tokens = tokens.astype(np.int64)
        batch = TextBatch(
            inputs=torch.from_numpy(tokens[:, :-1]), targets=torch.from_numpy(tokens[:, 1:])
        )
        if self._document_mask:
            _, starts, chunks = addresses.T
            batch["documents"] = torch.from_numpy(self._documents(chunks, starts))
        return batch

    def _has_rows(self, chunk: int) -> bool:
        return self.samples_per_block[chunk] > 0

    def _every_row(self, region: int) -> NDArray:
        """View a region as all the rows that could begin at any of its tokens, without a copy."""
        mapped, size = self._chunks.reader.regions.view(region), self._dtype.itemsize
        shape = (len(mapped) // size - self._length, self._length + 1)
        return np.ndarray(shape, self._dtype, mapped, strides=(size, size))

    def _documents(self, chunks: Int64Array, starts: Int64Array) -> NDArray[np.int32]:
        opened = np.zeros((len(chunks), self._length), np.int32)
        places = (starts - self._chunks.start(chunks)).tolist()
        for row, chunk, place in zip(opened, chunks.tolist(), places, strict=True):
            ends = self._chunks.ends(chunk)
            # A row that begins with an end token begins the document which that opens.
            first = bisect_right(ends, place)
            for end in ends[first : bisect_left(ends, place + self._length, first)]:
                row[end - place] = 1
        return np.cumsum(opened, axis=1, dtype=np.int32)

    def __getstate__(self) -> dict[str, object]:
        """Leave the counters behind, which belong to a process."""
        return {**self.__dict__, "_row": new_row()}
