"""Tar shards, written the same way every time: equal samples give equal bytes.

A shard appears under its name only when it is complete.
"""

import hashlib
import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from datamodules.index import Shard, ShardFacts, checksum
from datamodules.tar import split_name

BLOCK_BYTES = 4 * 2**20
"""A block ends with the sample that passes this size: large enough for one efficient read from an
object store, small enough that a shuffle's window in each lane spans several."""


class ShardWriter:
    """Write one shard; a context manager that leaves nothing behind when it fails.

    Args:
        path: of the finished shard.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self._blocks: list[tuple[int, int]] = []
        self._lengths: list[int] = []
        self._checksums: list[int] = []
        self._block_start = self._block_samples = 0
        self._last_key = ""

    def __enter__(self) -> "ShardWriter":
        """Open the temporary file."""
        # The pax format of tarfile is plain ustar for short names, which these are.
        self._file = _HashedFile(self._temporary.open("wb"))
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)  # type: ignore[call-overload]
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Close the temporary file, and remove it after an error."""
        if kind is not None:
            self._file.close()
            self._temporary.unlink(missing_ok=True)  # of several writers this one may be done

    def write(self, length: int, members: dict[str, NDArray | bytes], key: str = "") -> None:
        """Append a sample.

        Args:
            length: tokens of the sample, or its bytes where it has none, for the index.
            members: extension -> array, stored as `.npy`, or the bytes of a file.
            key: name of the sample in its shard; its number by default.

        Raises:
            ValueError: the sample would be read under another name, or as part of the last one.
        """
        key = key or f"{len(self._lengths):06d}"
        for extension in sorted(members):
            if key == self._last_key or split_name(f"{key}.{extension}") != (key, extension):
                raise ValueError(
                    f"member {key}.{extension} -> a key ends at the first dot, extensions are in "
                    "lower case, names in __ are passed over, and samples of one key behind each "
                    "other are one sample -> give another key or extension "
                    f"(shard {self._path.name}, key {key})"
                )
        for extension in sorted(members):
            content = _encode(members[extension])
            entry = tarfile.TarInfo(f"{key}.{extension}")  # mtime, owner and group are 0
            entry.size = len(content)
            self._tar.addfile(entry, io.BytesIO(content))
        self._last_key = key
        self._lengths.append(length)
        self._checksums.append(checksum(self._file.take()))
        self._block_samples += 1
        if self._tar.offset - self._block_start >= BLOCK_BYTES:
            self._end_block()

    def finish(self, documents: Sequence[int] = ()) -> ShardFacts:
        """Make the bytes durable, then give the shard its name.

        Args:
            documents: tokens of each document in the shard, for the index.
        """
        if self._block_samples:
            self._end_block()
        self._tar.close()
        num_bytes = self._file.tell()
        self._file.flush_to_disk()
        self._file.close()
        shard = Shard(
            url=self._path.name,
            num_bytes=num_bytes,
            num_samples=len(self._lengths),
            num_blocks=len(self._blocks),
            num_documents=len(documents),
            digest=self._file.digest,
        )
        self._temporary.replace(self._path)
        return ShardFacts(shard, self._blocks, self._lengths, self._checksums, documents)

    def _end_block(self) -> None:
        self._blocks.append((self._block_samples, self._tar.offset - self._block_start))
        self._block_start, self._block_samples = self._tar.offset, 0


class _HashedFile:
    """A file that hashes what is written, and keeps what was written since it was last asked."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash = file, hashlib.blake2b(digest_size=16)
        self._recent: list[bytes] = []
        self.close, self.tell = file.close, file.tell

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def write(self, content: bytes) -> int:
        self._hash.update(content)
        self._recent.append(content)
        return self._file.write(content)

    def take(self) -> bytes:
        recent, self._recent = b"".join(self._recent), []
        return recent

    def flush_to_disk(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


def _encode(content: NDArray | bytes) -> bytes:
    if isinstance(content, bytes):
        return content
    file = io.BytesIO()
    np.lib.format.write_array(file, content, version=(1, 0))
    return file.getvalue()
