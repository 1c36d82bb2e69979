"""Samples of a data set's shards, found by hopping from header to header inside a block.

Every sample is held against its checksum when it is found, so that a flipped bit is an error and
not a token.
"""

import json
import logging
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from datamodules.block_cache import BlockCache
from datamodules.index import Index, checksum, is_remote
from datamodules.meter import Counter, Row, new_row
from datamodules.order import Int64Array
from datamodules.regions import Place, Regions
from datamodules.tar import BadSampleError, StoredSample, check_members, read_samples

PARSED_BYTES = 64 * 2**20
"""Bound on the memory that parsed blocks may take in a process. Where it is too little, the oldest
lose first what headers say, which are then read again for each sample, and last the places of their
samples: 64 lanes may mix some 300 blocks at a time, and without places a whole block is parsed for
each sample."""
_ENTRY_BYTES = 800  # of a sample with its names and two members, as `tracemalloc` counts them

log = logging.getLogger(__name__)

T = TypeVar("T")

ACTIONS = ("raise", "substitute")


@dataclass(frozen=True)
class BadSamples:
    """What happens when a sample cannot be read as it was written.

    Attributes:
        action: `raise`, or `substitute` the next sample that can be read, in the order of the data
            set: the same one in every epoch, so that positions do not shift.
        max_samples: bad samples that one process substitutes at most.
        list_file: JSON Lines file that each of them is written to; None writes no list.
    """

    action: str
    max_samples: int
    list_file: Path | None = None


RAISE = BadSamples("raise", 0)


class ShardReader:
    """Random access to the samples of a data set.

    Opens nothing until the first sample is asked for, so it may be sent to a worker process.

    Args:
        index: of the data set.
        bad_samples: what to do about those that cannot be read.
        cache: of blocks that are not in local tars; None where all are.

    Attributes:
        regions: of the shards, in which samples lie.
    """

    def __init__(
        self, index: Index, bad_samples: BadSamples = RAISE, cache: BlockCache | None = None
    ) -> None:
        self._index, self._bad = index, bad_samples
        self.regions = Regions(index, cache, accept_bad=bad_samples.action == "substitute")
        self._block_ends = np.cumsum(index.blocks[:, 0], dtype=np.int64)
        self._parsed: OrderedDict[int, _Block] = OrderedDict()
        self._with_headers: deque[_Block] = deque()
        self._parsed_bytes = 0
        self._substitutes: dict[int, int] = {}
        self._row = new_row()

    def count_into(self, row: Row) -> None:
        """Add what is met from now on to a row of `datamodules.meter`."""
        self._row = row
        self.regions.count_into(row)

    def expect(self, numbers: Int64Array) -> None:
        """Begin to fetch the blocks of some samples, in this order, where they are not local."""
        self.regions.expect(np.searchsorted(self._block_ends, numbers, side="right"))

    def sample(self, number: int) -> tuple[StoredSample, int]:
        """Find a sample by its number in the data set, and the region that it lies in.

        Raises:
            BadSampleError: the shard does not hold what the index says; the message ends with shard
                and key, and says where.
        """
        found = self._block(int(self._block_ends.searchsorted(number, side="right")))
        place = number - found.first
        if place >= len(found.starts) - 1:
            raise self._error(found.problem, found.place.shard, f"sample {place} of its block")
        content = self.regions.view(found.place.region)
        if found.samples:
            sample = found.samples[place]
        else:
            (sample,), _ = read_samples(content, found.starts[place], found.starts[place + 1])
        try:
            check_members(sample, self._index.schema)
        except BadSampleError as err:
            raise self._error(str(err), found.place.shard, f"key {sample.key}") from err
        if checksum(content[sample.start : sample.stop]) != int(self._index.checksums[number]):
            offset = found.place.offset - found.place.start + sample.start
            problem = f"the sample at byte {offset} is not as it was written"
            remedy = "restore the shard or prepare the corpus again"
            raise self._error(f"{problem} -> {remedy}", found.place.shard, f"key {sample.key}")
        return sample, found.place.region

    def read(
        self,
        number: int,
        read: Callable[[int], T],
        usable: Callable[[int], bool] = lambda number: True,
    ) -> T:
        """Read a sample, or where it is bad and to be substituted the one that stands for it.

        Args:
            number: of the sample in the data set.
            read: makes of a sample, by its number, what is wanted; raises `BadSampleError`.
            usable: whether a sample may stand for another.

        Raises:
            BadSampleError: it cannot be read and is not to be substituted, or too many were.
        """
        number = self._substitutes.get(number, number)
        try:
            return read(number)
        except BadSampleError as err:
            if self._bad.action == "raise":
                raise
            return self._substitute(number, read, usable, err)

    def error(self, number: int, problem: str) -> BadSampleError:
        """Say what is wrong with a sample that can be found, with its shard and key."""
        block = int(np.searchsorted(self._block_ends, number, side="right"))
        key = self.sample(number)[0].key
        return self._error(problem, self.regions.place(block).shard, f"key {key}")

    def array(self, number: int, extension: str) -> tuple[int, np.dtype, int, int]:
        """Read the header of a one-dimensional `.npy` member of a sample.

        Returns:
            The region it lies in, its element type, the offset of its first element in the region
            in bytes, and its length.

        Raises:
            BadSampleError: the sample is bad, the member is no such array, or not of the type in
                the schema.
        """
        sample, region = self.sample(number)
        offset, size = sample.members[extension]
        member = _Window(self.regions.view(region), offset)
        try:
            np.lib.format.read_magic(member)
            shape, _, dtype = np.lib.format.read_array_header_1_0(member)
            matches = len(shape) == 1 and size == member.position + shape[0] * dtype.itemsize
        except ValueError as err:
            raise self.error(number, f"member {extension} is no .npy file") from err
        if not matches or dtype != np.dtype(self._index.schema[extension]["dtype"]):
            expected = self._index.schema[extension]["dtype"]
            problem = f"member {extension} holds {dtype}{list(shape)} in {size} bytes"
            raise self.error(number, f"{problem}, the schema says {expected}")
        return region, dtype, offset + member.position, shape[0]

    def _block(self, block: int) -> "_Block":
        if block in self._parsed:
            self._parsed.move_to_end(block)
            return self._parsed[block]
        place, expected = self.regions.place(block), int(self._index.blocks[block, 0])
        region = self.regions.view(place.region)
        stop = min(place.start + place.num_bytes, len(region))
        samples, error = read_samples(region, place.start, stop)
        problem = str(error)
        if error is None and len(samples) != expected:
            problem = (
                f"the index says {expected} samples in the block at byte {place.offset}, the shard "
                f"holds {len(samples)} -> positions would shift -> restore the shard or prepare "
                "the corpus again"
            )
        starts = array("q", [sample.start for sample in samples])
        starts.extend(sample.stop for sample in samples[-1:])
        first = int(self._block_ends[block]) - expected
        found = self._parsed[block] = _Block(first, starts, samples, problem, place)
        self._with_headers.append(found)
        self._parsed_bytes += found.num_bytes
        while self._parsed_bytes > PARSED_BYTES and self._with_headers:
            self._parsed_bytes -= self._with_headers.popleft().drop_headers()
        while self._parsed_bytes > PARSED_BYTES and len(self._parsed) > 1:
            self._parsed_bytes -= self._parsed.popitem(last=False)[1].num_bytes
        return found

    def _substitute(
        self,
        number: int,
        read: Callable[[int], T],
        usable: Callable[[int], bool],
        err: BadSampleError,
    ) -> T:
        if len(self._substitutes) >= self._bad.max_samples:
            raise BadSampleError(
                f"datamodule.max_bad_samples={self._bad.max_samples} -> one more sample is bad: "
                f"{err} -> restore the data, or raise the limit"
            ) from err
        total = len(self._index.checksums)
        for other in ((number + step) % total for step in range(1, total)):
            if not usable(other):
                continue
            try:
                found = read(other)
            except BadSampleError:
                continue
            self._note(number, other, err)
            return found
        raise err

    def _note(self, number: int, other: int, err: BadSampleError) -> None:
        self._substitutes[number] = other
        self._row[Counter.BAD_SAMPLES] += 1
        key = self.sample(other)[0].key
        log.warning("bad sample substituted by key %s: %s", key, err)
        if self._bad.list_file is not None:
            line = {"sample": number, "substitute": other, "substitute_key": key, "why": str(err)}
            with self._bad.list_file.open("a") as file:  # short appends do not mix
                file.write(json.dumps(line) + "\n")

    def _error(self, problem: str, shard: int, key: str) -> BadSampleError:
        if " -> " not in problem:
            problem += " -> it cannot be read -> restore the shard or prepare the corpus again"
        # The shard's own folder: data sets laid behind each other have shards of equal names.
        url = self._index.shards[shard].url
        path, name = (
            (self._index.path, url) if is_remote(url) else (Path(url).parent, Path(url).name)
        )
        return BadSampleError(f"data set {path}: {problem} (shard {name}, {key})")

    def __getstate__(self) -> dict[str, object]:
        """Leave the counters behind, which belong to a process."""
        return {**self.__dict__, "_row": new_row()}


@dataclass
class _Block:
    """A block, and why the samples that it lacks are not among those found.

    Attributes:
        first: number of its first sample in the data set.
        starts: offsets of its samples in the region, and that of the last one's end.
        samples: what their headers say; empty where that is dropped.
        problem: what is wrong with the block.
        place: of the block.
    """

    first: int
    starts: "array[int]"
    samples: list[StoredSample]
    problem: str
    place: Place

    @property
    def num_bytes(self) -> int:
        """Memory that it takes, about."""
        return self.starts.itemsize * len(self.starts) + _ENTRY_BYTES * len(self.samples)

    def drop_headers(self) -> int:
        """Keep the places of samples alone; gives the memory that this frees, about."""
        freed, self.samples = _ENTRY_BYTES * len(self.samples), []
        return freed


class _Window:
    """A file-like view of a region from an offset on, for numpy's header parser."""

    def __init__(self, region: memoryview, offset: int) -> None:
        self._region, self._offset, self.position = region, offset, 0

    def read(self, size: int = 0, /) -> bytes:
        start = self._offset + self.position
        self.position += size
        return bytes(self._region[start : start + size])
