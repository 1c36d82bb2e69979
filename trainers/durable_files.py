"""Small files that a crash leaves old or new, names that survive it, and digests."""

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def no_room(error: BaseException) -> str | None:
    """The message for the error of a disk that is full; None for any other."""
    if not isinstance(error, OSError) or error.errno not in NO_ROOM:
        return None
    return f"{error.filename or 'runs_dir'} -> {error} -> make room, then the same command"


def write_synced(path: Path, content: bytes) -> None:
    """Write a file that is on the disk when this returns; its name may not be."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, text: str, writer: str = "") -> None:
    """Replace a small text file so that a reader or a crash sees the old or the new, whole.

    Args:
        path: The file.
        text: What it says from then on.
        writer: Its name, where several processes may write the file at a time.
    """
    scratch = path.with_name(f".{path.name}{writer}.partial")
    write_synced(scratch, text.encode())
    scratch.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def new_digest(content: bytes = b"") -> Any:
    """BLAKE2b of 32 bytes, by which files are known."""
    return hashlib.blake2b(content, digest_size=32)


def digest_of(path: Path) -> str:
    """Digest of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, new_digest).hexdigest()
