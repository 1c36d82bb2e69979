"""Regions: what of a data set's shards is mapped at once.

A region is a whole local tar, or one block of a shard that is remote or compressed, which this
node's disk keeps (`datamodules.block_cache`). Regions are numbered, shards first, then blocks.
"""

import mmap
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from datamodules.block_cache import BlockCache
from datamodules.index import Index, checksum
from datamodules.meter import Counter, Row, new_row
from datamodules.order import Int64Array
from datamodules.remote import RemoteBlock, is_remote, is_sequential
from datamodules.tar import BadSampleError, read_samples

OPEN_SHARDS = 256
"""Bound on mapped shards; each holds a file descriptor, of which systems often allow 1024."""

_COUNTERS = {
    "hits": Counter.CACHE_HITS,
    "misses": Counter.CACHE_MISSES,
    "uncached": Counter.UNCACHED,
    "fetched_bytes": Counter.FETCHED_BYTES,
    "retries": Counter.RETRIES,
}


@dataclass(frozen=True)
class Place:
    """Where a block lies.

    Attributes:
        block: its number in the data set.
        shard: number of its shard.
        offset: of its first byte in the tar.
        num_bytes: its size.
        region: number of the region that holds it.
        start: of its first byte in the region.
    """

    block: int
    shard: int
    offset: int
    num_bytes: int
    region: int
    start: int


class Regions:
    """The regions of a data set; opens nothing until one is asked for.

    Args:
        index: of the data set.
        cache: of blocks that are not in local tars; None where all are.
        accept_bad: give a block that is not what the index says, if that is all there is.

    Raises:
        ValueError: a shard is remote or compressed, and there is no cache.
    """

    def __init__(self, index: Index, cache: BlockCache | None, *, accept_bad: bool) -> None:
        self._index, self._cache, self._accept_bad = index, cache, accept_bad
        blocks_per_shard = np.array([shard.num_blocks for shard in index.shards])
        self._first_block = np.concatenate([[0], np.cumsum(blocks_per_shard)])
        self._is_cached = [is_remote(s.url) or is_sequential(s.url) for s in index.shards]
        if cache is None and any(self._is_cached):
            url = index.shards[self._is_cached.index(True)].url
            raise ValueError(f"{url} -> is no local tar -> it needs a cache (datamodule.cache)")
        self._shards: OrderedDict[int, memoryview] = OrderedDict()
        self._row: Row = new_row()
        self._last_fetched = -1

    def count_into(self, row: Row) -> None:
        """Add what the cache counts from now on to a row of `datamodules.meter`."""
        self._row = row

    def place(self, block: int) -> Place:
        """Tell where a block lies."""
        shard = int(np.searchsorted(self._first_block, block, side="right")) - 1
        sizes = self._index.blocks[self._first_block[shard] : block + 1, 1]
        num_bytes = int(sizes[-1])
        offset = int(sizes.sum(dtype=np.int64)) - num_bytes
        if self._is_cached[shard]:
            return Place(block, shard, offset, num_bytes, len(self._index.shards) + block, 0)
        return Place(block, shard, offset, num_bytes, shard, offset)

    def expect(self, blocks: Int64Array) -> None:
        """Begin to fetch blocks, int64 [n], in this order, where they are not local; no waiting."""
        if self._cache is None:
            return
        _, firsts = np.unique(blocks, return_index=True)
        places = [self.place(block) for block in blocks[np.sort(firsts)].tolist()]
        self._cache.expect([self._remote(p) for p in places if self._is_cached[p.shard]])

    def view(self, region: int) -> memoryview:
        """Map a region into memory, read-only; not to be held longer than it is used.

        Raises:
            BadSampleError: there is no such shard any more, or nothing in it.
            ValueError: a block cannot be fetched, or is not what the index says.
        """
        if region >= len(self._index.shards):
            return self._fetched(region - len(self._index.shards))
        if region in self._shards:
            self._shards.move_to_end(region)
            return self._shards[region]
        path = Path(self._index.shards[region].url)
        try:
            with path.open("rb") as file:
                mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (FileNotFoundError, ValueError) as err:  # ValueError: it is empty
            raise BadSampleError(
                f"data set {path.parent}: the shard cannot be mapped ({err}) -> its samples cannot "
                f"be read -> restore it or prepare the corpus again (shard {path.name}, every key)"
            ) from err
        self._shards[region] = mapped
        if len(self._shards) > OPEN_SHARDS:
            self._shards.popitem(last=False)  # unmapped once the last view of it is gone
        return mapped

    def _fetched(self, block: int) -> memoryview:
        assert self._cache is not None
        remote, check = self._remote(self.place(block))
        try:
            content = self._cache.get(remote, check)
        except ValueError:
            if not self._accept_bad:
                raise
            content = self._cache.get(remote, _accept)
        if block != self._last_fetched:  # asking for the same again counts for nothing
            self._last_fetched = block
            self._count()
        return memoryview(content)

    def _count(self) -> None:
        assert self._cache is not None
        # Of all that is read through the cache here: evaluation and training take turns.
        for name, count in self._cache.take_counts().items():
            self._row[_COUNTERS[name]] += count

    def _remote(self, place: Place) -> tuple[RemoteBlock, Callable[[memoryview], None]]:
        shard = self._index.shards[place.shard]
        block = RemoteBlock(shard.url, place.offset, place.num_bytes, shard.digest)
        return block, partial(self._check, place)

    def _check(self, place: Place, content: memoryview) -> None:
        """Refuse a block that does not hold what the index says."""
        samples, error = read_samples(content, 0, len(content))
        first = int(self._index.blocks[: place.block, 0].sum(dtype=np.int64))
        expected = self._index.checksums[first : first + int(self._index.blocks[place.block, 0])]
        found = [checksum(content[sample.start : sample.stop]) for sample in samples]
        if error is None and found == expected.tolist():
            return
        raise ValueError(
            f"the block at byte {place.offset} is not the one that was indexed "
            f"({error or 'its checksums differ'})"
        )

    def __getstate__(self) -> dict[str, object]:
        """Leave the maps behind: the receiving process opens its own."""
        return {**self.__dict__, "_shards": OrderedDict(), "_row": new_row()}


def _accept(content: memoryview) -> None:
    """Let a block pass as it came."""
