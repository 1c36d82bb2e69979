"""Samples of a data set's shards, found by hopping from header to header inside a block.

A *region* is what is mapped at once: a whole local shard. Every sample is held against its checksum
when it is found, so that a flipped bit is an error and not a token.
"""

import json
import logging
import mmap
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datamodules.index import Index, checksum
from datamodules.meter import Counter, Row, new_row
from datamodules.order import Int64Array
from datamodules.tar import BadSampleError, StoredSample, check_members, read_samples

PARSED_BYTES = 64 * 2**20
"""Bound on the memory that parsed blocks may take in a process."""
_ENTRY_BYTES = 600  # of a sample with its names and two members, as `sys.getsizeof` adds them up

OPEN_REGIONS = 256
"""Bound on mapped regions; each holds a file descriptor, of which systems often allow 1024."""

log = logging.getLogger(__name__)


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
    """

    def __init__(self, index: Index, bad_samples: BadSamples = RAISE) -> None:
        self._index, self._bad = index, bad_samples
        blocks_per_shard = np.array([shard.num_blocks for shard in index.shards])
        self._first_block = np.concatenate([[0], np.cumsum(blocks_per_shard)])
        self._block_ends = np.cumsum(index.blocks[:, 0], dtype=np.int64)
        self._regions: OrderedDict[int, memoryview] = OrderedDict()
        self._parsed: OrderedDict[int, _Block] = OrderedDict()
        self._parsed_samples = 0
        self._substitutes: dict[int, int] = {}
        self._row = new_row()

    def count_into(self, row: Row) -> None:
        """Add what is met from now on to a row of `datamodules.meter`."""
        self._row = row

    def expect(self, numbers: Int64Array) -> None:
        """Begin to fetch the blocks of some samples, in this order, where they are not local."""

    def number(self, block: int, place: int) -> int:
        """Number in the data set of a sample in a block."""
        return int(self._block_ends[block]) - int(self._index.blocks[block, 0]) + place

    def sample(self, number: int) -> tuple[StoredSample, int]:
        """Find a sample by its number in the data set, and the region that it lies in.

        Raises:
            BadSampleError: the shard does not hold what the index says; the message ends with shard
                and key, and says where.
        """
        block = int(np.searchsorted(self._block_ends, number, side="right"))
        found = self._block(block)
        place = number - (int(self._block_ends[block]) - int(self._index.blocks[block, 0]))
        if place >= len(found.samples):
            raise self._error(found.problem, found.shard, f"sample {place} of its block")
        sample = found.samples[place]
        try:
            check_members(sample, self._index.schema)
        except BadSampleError as err:
            raise self._error(str(err), found.shard, f"key {sample.key}") from err
        content = self.region(found.region)[sample.start : sample.stop]
        if checksum(content) != self._index.checksums[number]:
            problem = f"the bytes {sample.start} to {sample.stop} are not those that were written"
            remedy = "restore the shard or prepare the corpus again"
            raise self._error(f"{problem} -> {remedy}", found.shard, f"key {sample.key}")
        return sample, found.region

    def readable(self, number: int, usable: Callable[[int], bool] = lambda number: True) -> int:
        """Number of the sample to take for a sample: itself, unless it is bad and substituted.

        Args:
            number: of the sample in the data set.
            usable: whether a sample may stand for another.

        Raises:
            BadSampleError: it cannot be read and is not to be substituted, or too many were.
        """
        if number in self._substitutes:
            return self._substitutes[number]
        try:
            self.sample(number)
        except BadSampleError as err:
            if self._bad.action == "raise":
                raise
            return self._substitute(number, usable, err)
        return number

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
        member = _Window(self.region(region), offset)
        shard, key = self._shard_of(number), f"key {sample.key}"
        try:
            np.lib.format.read_magic(member)
            shape, _, dtype = np.lib.format.read_array_header_1_0(member)
            matches = len(shape) == 1 and size == member.position + shape[0] * dtype.itemsize
        except ValueError as err:
            raise self._error(f"member {extension} is no .npy file", shard, key) from err
        if not matches or dtype != np.dtype(self._index.schema[extension]["dtype"]):
            expected = self._index.schema[extension]["dtype"]
            problem = f"member {extension} holds {dtype}{list(shape)} in {size} bytes"
            raise self._error(f"{problem}, the schema says {expected}", shard, key)
        return region, dtype, offset + member.position, shape[0]

    def region(self, number: int) -> memoryview:
        """Map a region into memory, read-only."""
        if number in self._regions:
            self._regions.move_to_end(number)
            return self._regions[number]
        with open(self._index.shards[number].url, "rb") as file:
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self._regions[number] = mapped
        if len(self._regions) > OPEN_REGIONS:
            self._regions.popitem(last=False)  # unmapped once the last view of it is gone
        return mapped

    def _shard_of(self, number: int) -> int:
        block = np.searchsorted(self._block_ends, number, side="right")
        return int(np.searchsorted(self._first_block, block, side="right")) - 1

    def _block(self, block: int) -> "_Block":
        if block in self._parsed:
            self._parsed.move_to_end(block)
            return self._parsed[block]
        shard = int(np.searchsorted(self._first_block, block, side="right")) - 1
        table = self._index.blocks
        start = int(table[self._first_block[shard] : block, 1].sum(dtype=np.int64))
        expected, num_bytes = (int(value) for value in table[block])
        region = self.region(shard)
        samples, error = read_samples(region, start, min(start + num_bytes, len(region)))
        problem = str(error)
        if error is None and len(samples) != expected:
            problem = (
                f"the index says {expected} samples in the block at byte {start}, the shard holds "
                f"{len(samples)} -> positions would shift -> restore the shard or prepare the "
                "corpus again"
            )
            samples = []  # of another block than the index knows: none is the one asked for
        found = self._parsed[block] = _Block(samples, problem, shard, shard)
        self._parsed_samples += len(samples)
        while self._parsed_samples * _ENTRY_BYTES > PARSED_BYTES and len(self._parsed) > 1:
            self._parsed_samples -= len(self._parsed.popitem(last=False)[1].samples)
        return found

    def _substitute(self, number: int, usable: Callable[[int], bool], err: BadSampleError) -> int:
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
                self.sample(other)
            except BadSampleError:
                continue
            self._note(number, other, err)
            return other
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
        url = self._index.shards[shard].url
        name = url if "://" in url else Path(url).name
        return BadSampleError(f"data set {self._index.path}: {problem} (shard {name}, {key})")

    def __getstate__(self) -> dict[str, object]:
        """Leave the maps behind: the receiving process opens its own."""
        return {**self.__dict__, "_regions": OrderedDict(), "_row": new_row()}


@dataclass(frozen=True)
class _Block:
    """Samples of a block, and why those that it lacks are not among them."""

    samples: list[StoredSample]
    problem: str
    shard: int
    region: int


class _Window:
    """A file-like view of a region from an offset on, for numpy's header parser."""

    def __init__(self, region: memoryview, offset: int) -> None:
        self._region, self._offset, self.position = region, offset, 0

    def read(self, size: int = 0, /) -> bytes:
        start = self._offset + self.position
        self.position += size
        return bytes(self._region[start : start + size])
