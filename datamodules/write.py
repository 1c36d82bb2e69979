"""Tar shards, written the same way every time: equal samples give equal bytes.

A shard appears under its name only when it is complete.
"""

import io
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from datamodules.index import Shard, digest_file

BLOCK_BYTES = 8 * 2**20
"""A block ends with the sample that passes this size: large enough for one efficient read from an
object store, small enough to hop through."""


@dataclass(frozen=True)
class ShardFacts:
    """What the index takes over about one shard.

    Attributes:
        shard: its entry.
        blocks: samples and bytes of each block.
        lengths: tokens of each sample.
        text: counts of what went in: documents, bytes of text, tokens.
    """

    shard: Shard
    blocks: list[tuple[int, int]]
    lengths: list[int]
    text: dict[str, int]


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
        self._block_start = self._block_samples = 0

    def __enter__(self) -> "ShardWriter":
        """Open the temporary file."""
        # The pax format of tarfile is plain ustar for short names, which these are.
        self._tar = tarfile.open(self._temporary, "w", format=tarfile.PAX_FORMAT)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Close the temporary file, and remove it after an error."""
        if kind is not None:
            self._tar.fileobj.close()  # pyright: ignore[reportOptionalMemberAccess]
            self._temporary.unlink()

    def write(self, length: int, members: dict[str, NDArray]) -> None:
        """Append a sample.

        Args:
            length: tokens of the sample, for the index.
            members: extension -> array, stored as `.npy`.
        """
        key = f"{len(self._lengths):06d}"
        for extension in sorted(members):
            content = io.BytesIO()
            np.lib.format.write_array(content, members[extension], version=(1, 0))
            entry = tarfile.TarInfo(f"{key}.{extension}")  # mtime, owner and group are 0
            entry.size = content.tell()
            content.seek(0)
            self._tar.addfile(entry, content)
        self._lengths.append(length)
        self._block_samples += 1
        if self._tar.offset - self._block_start >= BLOCK_BYTES:
            self._end_block()

    def finish(self, text: dict[str, int]) -> ShardFacts:
        """Make the bytes durable, then give the shard its name.

        Args:
            text: counts of what went in, kept with the facts.
        """
        if self._block_samples:
            self._end_block()
        self._tar.close()
        with self._temporary.open("rb") as file:
            os.fsync(file.fileno())
        shard = Shard(
            url=self._path.name,
            num_bytes=self._temporary.stat().st_size,
            num_samples=len(self._lengths),
            num_blocks=len(self._blocks),
            digest=digest_file(self._temporary),
        )
        facts = ShardFacts(shard, self._blocks, self._lengths, text)
        self._temporary.replace(self._path)
        return facts

    def _end_block(self) -> None:
        self._blocks.append((self._block_samples, self._tar.offset - self._block_start))
        self._block_start, self._block_samples = self._tar.offset, 0
