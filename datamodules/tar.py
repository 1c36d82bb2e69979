"""Tar archives as webdataset reads them: members, and the samples that they make.

Naming and grouping follow `webdataset.tariterators`: the key is the path up to the first dot of the
file name, the extension is the rest in lower case; directories, links, names without a dot and
`__name__` members are passed over; consecutive members of one key are a sample.
"""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

_TAR_BLOCK = 512
_ADLER_MODULUS = 65_521
_META = re.compile(r"__[^/]*__($|/)")
_KEY_AND_EXTENSION = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)


class BadSampleError(ValueError):
    """A sample that cannot be read as it was written."""


@dataclass(frozen=True)
class Member:
    """A regular file in an archive.

    Attributes:
        name: its path.
        start: offset of its first header, in bytes.
        offset: of its content.
        size: of its content.
    """

    name: str
    start: int
    offset: int
    size: int


@dataclass
class StoredSample:
    """Where a sample's members lie.

    Attributes:
        key: name of the sample in its shard.
        start: offset of its first header, in bytes.
        stop: offset of what follows its last member, in bytes.
        members: extension -> (offset, size) of the content, in bytes.
        repeated: names of members that it has twice.
    """

    key: str
    start: int
    stop: int = 0
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)


def split_name(name: str) -> tuple[str, str] | None:
    """Give the key and the extension of a member; None where it is passed over."""
    match = _KEY_AND_EXTENSION.match(name)
    if match is None or _META.match(name):
        return None
    return match.group(1), match.group(2).lower()


def read_members(tar: Any, start: int, stop: int) -> Iterator[Member]:
    """Give the regular files between two offsets of a tar archive.

    Reads ustar, and the names of GNU (type L) and POSIX pax (type x) extensions.

    Args:
        tar: the archive, as bytes or a map of them.
        start: offset of a header, in bytes.
        stop: offset to stop at, in bytes; an end-of-archive block before it ends the list.

    Raises:
        BadSampleError: no header where one should be, or a file that passes `stop`; the message
            gives the offset.
    """
    long_name, pax, first = None, {}, None
    offset = start
    while offset < stop:
        header = bytes(tar[offset : offset + _TAR_BLOCK])
        if header.count(0) == _TAR_BLOCK:
            return
        size = _checked_size(header, offset)
        kind, data = header[156:157], offset + _TAR_BLOCK
        first = offset if first is None else first
        if kind == b"L":
            long_name = bytes(tar[data : data + size]).rstrip(b"\0").decode()
        elif kind == b"x":
            pax = _parse_pax(bytes(tar[data : data + size]))
        elif kind != b"g":
            size = int(pax.get("size", size))
            if data + size > stop:
                raise BadSampleError(
                    f"a file of {size} bytes at byte {data} passes the end at byte {stop} -> the "
                    "shard is damaged or cut short -> restore it or prepare the corpus again"
                )
            if kind in (b"0", b"\0"):
                name = pax.get("path") or long_name or _ustar_name(header)
                yield Member(name, first, data, size)
            long_name, pax, first = None, {}, None
        offset = data + _padded(size)


def read_samples(
    tar: Any, start: int, stop: int
) -> tuple[list[StoredSample], BadSampleError | None]:
    """Group the members between two offsets into samples, as webdataset does.

    Args:
        tar: the archive, as bytes or a map of them.
        start: offset of a header, in bytes.
        stop: offset to stop at, in bytes.

    Returns:
        The samples up to the first place where no header can be read, and what is wrong there.
    """
    samples: list[StoredSample] = []
    error = None
    try:
        for member in read_members(tar, start, stop):
            if (parts := split_name(member.name)) is None:
                continue
            key, extension = parts
            if not samples or samples[-1].key != key:
                samples.append(StoredSample(key, member.start))
            if extension in samples[-1].members:
                samples[-1].repeated.append(member.name)
            samples[-1].members[extension] = (member.offset, member.size)
            samples[-1].stop = member.offset + _padded(member.size)
    except BadSampleError as reason:
        error = reason
    except ValueError as reason:  # a number or a name in an extended header
        error = BadSampleError(f"a damaged tar header ({reason}) -> restore the shard")
    return samples, error


def check_members(sample: StoredSample, schema: dict[str, dict[str, str]]) -> None:
    """Compare a sample's members with the schema.

    Raises:
        BadSampleError: it lacks a member, or has one twice; the message gives the offset.
    """
    if sample.repeated:
        raise BadSampleError(
            f"two members {sample.repeated[0]} at byte {sample.start} -> which one is meant cannot "
            "be told -> give them different keys"
        )
    if missing := [
        name for name in schema if name not in sample.members and "optional" not in schema[name]
    ]:
        raise BadSampleError(
            f"a sample at byte {sample.start} lacks {sorted(missing)} of the schema -> it cannot "
            "be read -> restore the shard or prepare again"
        )


def _padded(size: int) -> int:
    return -(-size // _TAR_BLOCK) * _TAR_BLOCK


def _checked_size(header: bytes, offset: int) -> int:
    # The sum of its bytes, those of the sum itself counted as eight spaces. The lower half of
    # Adler-32 is one more than a sum of bytes, modulo 65,521, and takes a tenth of the time.
    recorded = header[148:156].strip(b"\0 ")
    own = (zlib.adler32(header) & 0xFFFF) - 1 - sum(header[148:156]) + 8 * ord(" ")
    is_whole = len(header) == _TAR_BLOCK and recorded.isdigit()
    if not is_whole or (int(recorded, 8) - own) % _ADLER_MODULUS:
        raise BadSampleError(
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
