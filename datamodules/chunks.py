"""Token chunks of a text data set: where each lies, and what it holds.

A chunk is a stored sample: `tokens.npy`, and `ends.npy` with the places of documents' end tokens.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from datamodules.block_cache import BlockCache
from datamodules.index import Index
from datamodules.order import Int64Array
from datamodules.reader import BadSamples, ShardReader

READ_TOKENS = 2**18
"""Tokens copied in one go, which spares small batches the cost of a call per shard."""

_CACHED_ENDS = 4096
"""Chunks whose document ends are kept at hand: 2 GiB of text at 1 MiB a chunk."""


class TokenChunks:
    """Chunks by number, each held against its checksum when it is first met by a process.

    Args:
        index: of the data set.
        bad_samples: what to do about chunks that cannot be read.
        cache: of blocks of shards that are not local tars.
        usable: whether a chunk may stand for another that cannot be read.

    Attributes:
        dtype: of the stored tokens.
        reader: of the shards.
        lengths: int64 [chunks], tokens of each.
        stops: int64 [chunks], their ends, counted through the data set.
    """

    def __init__(
        self,
        index: Index,
        bad_samples: BadSamples,
        cache: BlockCache | None,
        usable: Callable[[int], bool],
    ) -> None:
        self.dtype = np.dtype(index.schema["tokens.npy"]["dtype"]).newbyteorder("<")
        self.reader = ShardReader(index, bad_samples, cache)
        self.lengths: Int64Array = index.lengths.astype(np.int64)
        self.stops: Int64Array = np.cumsum(self.lengths)
        self._usable = usable
        # Of each chunk the one to read, its region, and its first token counted from the region's
        # begin; filled in as chunks are met.
        self._chunk = np.arange(len(self.lengths))
        self._region = np.full(len(self.lengths), -1)
        self._start = np.zeros(len(self.lengths), np.int64)
        self._ends: dict[int, memoryview] = {}

    def locate(self, chunks: Int64Array) -> tuple[Int64Array, Int64Array, Int64Array]:
        """Find chunks, int64 [n].

        Returns:
            The chunks to read in their places, their regions, and their first tokens counted from
            the region's begin; int64 [n] each.

        Raises:
            BadSampleError: a chunk cannot be read, and is not to be substituted.
        """
        for chunk in np.unique(chunks[self._region[chunks] < 0]).tolist():
            self._meet(chunk)
        read = self._chunk[chunks]
        return read, self._region[read], self._start[read]

    def expect(self, windows: Int64Array, tokens_of: Callable[[int], tuple[int, int]]) -> None:
        """Begin to fetch what some windows of tokens lie in, where it is not local.

        Args:
            windows: int64 [n], each once or more; in the order in which they come first.
            tokens_of: gives a window's first token and the one it stops before, counted through the
                data set.
        """
        _, firsts = np.unique(windows, return_index=True)
        for window in windows[np.sort(firsts)].tolist():
            start, stop = tokens_of(window)
            first, last = self.stops.searchsorted([start, stop - 1], side="right")
            self.reader.expect(np.arange(first, last + 1))

    def start(self, chunks: Int64Array) -> Int64Array:
        """First tokens of chunks that have been located."""
        return self._start[chunks]

    def tokens(self, chunk: int) -> NDArray:
        """View the tokens of a chunk, or of the one that stands for it."""
        if self._region[chunk] < 0:
            self._meet(chunk)
        read = int(self._chunk[chunk])
        region, start = int(self._region[read]), int(self._start[read])
        content = self.reader.regions.view(region)
        return np.frombuffer(
            content, self.dtype, int(self.lengths[read]), start * self.dtype.itemsize
        )

    def ends(self, chunk: int) -> memoryview:
        """Places of end tokens in a chunk that has been located, ascending."""
        if (ends := self._ends.get(chunk)) is None:
            if len(self._ends) >= _CACHED_ENDS:
                self._ends.clear()
            region, dtype, offset, count = self.reader.array(chunk, "ends.npy")
            stored = np.frombuffer(self.reader.regions.view(region), dtype, count, offset)
            # Bisecting a row's few ends costs Python a tenth of what a call of numpy does.
            ends = self._ends[chunk] = stored.astype(np.uint32).data
        return ends

    def _meet(self, chunk: int) -> None:
        read, region, offset = self.reader.read(chunk, self._find, self._usable)
        self._chunk[chunk] = read
        for met in (chunk, read):
            self._region[met], self._start[met] = region, offset // self.dtype.itemsize

    def _find(self, chunk: int) -> tuple[int, int, int]:
        """Tell the chunk's number, its region, and the offset of its tokens there in bytes."""
        self.reader.array(chunk, "ends.npy")
        region, _, offset, _ = self.reader.array(chunk, "tokens.npy")
        return chunk, region, offset

    def __getstate__(self) -> dict[str, object]:
        """Leave the cached views behind, which cannot be sent to another process."""
        return {**self.__dict__, "_ends": {}}


def any_chunk(chunk: int) -> bool:
    """Let every chunk stand for another."""
    return True
