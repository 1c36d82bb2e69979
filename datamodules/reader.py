"""Samples of local tar shards, found by hopping from header to header inside a block.

Naming and grouping follow webdataset (`webdataset.tariterators`): the key is the path up to the
first dot of the file name, the extension is the rest in lower case; directories, links, names
without a dot and `__name__` members are passed over; consecutive members of one key are a sample.
"""

import mmap
import re
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from datamodules.index import Index

_TAR_BLOCK = 512
_META = re.compile(r"__[^/]*__($|/)")
_KEY_AND_EXTENSION = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)

PARSED_BYTES = 64 * 2**20
"""Bound on the memory that parsed blocks may take in a process."""
_ENTRY_BYTES = 600  # of a sample with its names and two members, as `sys.getsizeof` adds them up

OPEN_SHARDS = 256
"""Bound on mapped shards; each holds a file descriptor, of which systems often allow 1024."""


@dataclass(frozen=True)
class StoredSample:
    """Where a sample's members lie.

    Attributes:
        shard: number of the shard.
        key: name of the sample in its shard.
        members: extension -> (offset, size) in the shard, in bytes.
    """

    shard: int
    key: str
    members: dict[str, tuple[int, int]]


def parse_members(tar: mmap.mmap | bytes, start: int, stop: int) -> list[tuple[str, int, int]]:
    """List the regular files between two offsets of a tar archive.

    Reads ustar, and the names of GNU (type L) and POSIX pax (type x) extensions.

    Args:
        tar: the archive.
        start: offset of a header, in bytes.
        stop: offset to stop at, in bytes; an end-of-archive block before it ends the list.

    Returns:
        Name, offset and size of every regular file, in order.

    Raises:
        ValueError: no header where one should be; the message gives the offset.
    """
    found = []
    long_name, pax = None, {}
    offset = start
    while offset < stop:
        header = tar[offset : offset + _TAR_BLOCK]
        if header.count(0) == _TAR_BLOCK:
            break
        size = _checked_size(header, offset)
        kind, data = header[156:157], offset + _TAR_BLOCK
        if kind == b"L":
            long_name = tar[data : data + size].rstrip(b"\0").decode()
        elif kind == b"x":
            pax = _parse_pax(tar[data : data + size])
        elif kind != b"g":
            size = int(pax.get("size", size))
            if kind in (b"0", b"\0"):
                found.append((pax.get("path") or long_name or _ustar_name(header), data, size))
            long_name, pax = None, {}
        offset = data + -(-size // _TAR_BLOCK) * _TAR_BLOCK
    return found


def group_members(
    members: list[tuple[str, int, int]], shard: int, schema: dict[str, dict[str, str]]
) -> list[StoredSample]:
    """Group consecutive members of one key into samples, as webdataset does.

    Raises:
        ValueError: a sample lacks a member of the schema or has it twice; the message ends with
            its key.
    """
    samples: list[StoredSample] = []
    for name, offset, size in members:
        match = _KEY_AND_EXTENSION.match(name)
        if match is None or _META.match(name):
            continue
        key, extension = match.group(1), match.group(2).lower()
        if not samples or samples[-1].key != key:
            samples.append(StoredSample(shard, key, {}))
        if extension in samples[-1].members:
            raise ValueError(
                f"two members {name} -> which one is meant cannot be told -> give them different "
                f"keys (key {key})"
            )
        samples[-1].members[extension] = (offset, size)
    for sample in samples:
        if missing := schema.keys() - sample.members.keys():
            raise ValueError(
                f"a sample lacks {sorted(missing)} of the schema -> it cannot be read -> "
                f"restore the shard or prepare again (key {sample.key})"
            )
    return samples


class ShardReader:
    """Random access to the samples of a data set.

    Opens nothing until the first sample is asked for, so it may be sent to a worker process.

    Args:
        index: of the data set.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        blocks_per_shard = np.array([shard.num_blocks for shard in index.shards])
        self._first_block = np.concatenate([[0], np.cumsum(blocks_per_shard)])
        self._block_ends = np.cumsum(index.blocks[:, 0], dtype=np.int64)
        self._shards: OrderedDict[int, mmap.mmap] = OrderedDict()
        self._parsed: OrderedDict[int, list[StoredSample]] = OrderedDict()
        self._parsed_samples = 0

    def sample(self, number: int) -> StoredSample:
        """Find a sample by its number in the data set.

        Raises:
            ValueError: the shard does not hold what the index says; the message names the shard.
        """
        block = int(np.searchsorted(self._block_ends, number, side="right"))
        samples = self._block(block)
        return samples[number - (int(self._block_ends[block]) - len(samples))]

    def array(self, sample: StoredSample, extension: str) -> tuple[np.dtype, int, int]:
        """Read the header of a one-dimensional `.npy` member.

        Returns:
            Its element type, the offset of its first element in the shard in bytes, and its length.

        Raises:
            ValueError: the member is no such array, or not of the type in the schema.
        """
        offset, size = sample.members[extension]
        member = _Window(self.shard(sample.shard), offset)
        try:
            np.lib.format.read_magic(member)
            shape, _, dtype = np.lib.format.read_array_header_1_0(member)
            matches = len(shape) == 1 and size == member.position + shape[0] * dtype.itemsize
        except ValueError as err:
            raise self._error(f"member {extension} is no .npy file", sample) from err
        if not matches or dtype != np.dtype(self._index.schema[extension]["dtype"]):
            expected = self._index.schema[extension]["dtype"]
            problem = f"member {extension} holds {dtype}{list(shape)} in {size} bytes"
            raise self._error(f"{problem}, the schema says {expected}", sample)
        return dtype, offset + member.position, shape[0]

    def shard(self, number: int) -> mmap.mmap:
        """Map a shard into memory, read-only."""
        if number in self._shards:
            self._shards.move_to_end(number)
            return self._shards[number]
        with (self._index.path / self._index.shards[number].url).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._shards[number] = mapped
        if len(self._shards) > OPEN_SHARDS:
            self._shards.popitem(last=False)  # unmapped once the last view of it is gone
        return mapped

    def _block(self, block: int) -> list[StoredSample]:
        if block in self._parsed:
            self._parsed.move_to_end(block)
            return self._parsed[block]
        shard = int(np.searchsorted(self._first_block, block, side="right")) - 1
        table = self._index.blocks
        start = int(table[self._first_block[shard] : block, 1].sum(dtype=np.int64))
        expected, num_bytes = (int(value) for value in table[block])
        name = self._index.shards[shard].url
        try:
            members = parse_members(self.shard(shard), start, start + num_bytes)
            samples = group_members(members, shard, self._index.schema)
        except ValueError as err:
            raise ValueError(f"{err} (shard {name})") from err
        if len(samples) != expected:
            raise ValueError(
                f"data set {self._index.path}: the index says {expected} samples in the block at "
                f"byte {start}, the shard holds {len(samples)} -> positions would shift -> "
                f"restore the shard or prepare the corpus again (shard {name})"
            )
        self._parsed[block] = samples
        self._parsed_samples += len(samples)
        while self._parsed_samples * _ENTRY_BYTES > PARSED_BYTES and len(self._parsed) > 1:
            self._parsed_samples -= len(self._parsed.popitem(last=False)[1])
        return samples

    def _error(self, problem: str, sample: StoredSample) -> ValueError:
        return ValueError(
            f"data set {self._index.path}: {problem} -> it cannot be read -> restore the shard or "
            f"prepare the corpus again (shard {self._index.shards[sample.shard].url}, "
            f"key {sample.key})"
        )

    def __getstate__(self) -> dict[str, object]:
        """Leave the maps behind: the receiving process opens its own."""
        return {**self.__dict__, "_shards": OrderedDict()}


class _Window:
    """A file-like view of a map from an offset on, for numpy's header parser."""

    def __init__(self, mapped: mmap.mmap, offset: int) -> None:
        self._mapped, self._offset, self.position = mapped, offset, 0

    def read(self, size: int = 0, /) -> bytes:
        start = self._offset + self.position
        self.position += size
        return self._mapped[start : start + size]


def _checked_size(header: bytes, offset: int) -> int:
    # The checksum counts its own field as eight spaces.
    total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    recorded = header[148:156].rstrip(b"\0 ")
    if len(header) < _TAR_BLOCK or not recorded.isdigit() or int(recorded, 8) != total:
        raise ValueError(
            f"no tar header at byte {offset} -> the shard is damaged or cut short -> restore it "
            "or prepare the corpus again"
        )
    field = header[124:136]
    if field[0] & 0x80:  # GNU: sizes beyond 8 GiB are binary
        return int.from_bytes(field[1:], "big")
    return int(field.rstrip(b"\0 ") or b"0", 8)


def _parse_pax(content: bytes) -> dict[str, str]:
    records = {}
    while content:
        length = int(content.split(b" ", 1)[0])
        name, value = content[:length].split(b" ", 1)[1][:-1].split(b"=", 1)
        records[name.decode()] = value.decode()
        content = content[length:]
    return records


def _ustar_name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0].decode()
    if header[257:263] == b"ustar\0" and (prefix := header[345:500].split(b"\0", 1)[0]):
        return f"{prefix.decode()}/{name}"
    return name
