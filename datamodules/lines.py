"""Lines of JSONL files, plain or compressed, as a stream: in memory are a line and a buffer."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

JSONL = ".jsonl"
COMPRESSED = (".jsonl.gz", ".jsonl.zst")

_READ_BYTES = 2**20
# What these bytes decompress to is in memory at once: at most 32 MiB, since a block of Zstandard
# takes 4 bytes or more and gives 128 KiB or less.
_ZSTD_READ_BYTES = 2**10
_LARGEST_WINDOW = 2**31  # of zstd: as `zstd --long=31` writes, which large dumps are made with


def suffix_of(path: Path) -> str:
    """Ending of a file's name; that of a compressed JSONL file has two parts."""
    double = "".join(path.suffixes[-2:])
    return double if double in COMPRESSED else path.suffix


def read_lines(path: Path, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """Read the lines whose first byte is in a part of a file.

    Args:
        path: of the file.
        start: first byte of the part; a compressed file is one part.
        stop: its end.

    Returns:
        Offset in the text, and the line with its end.

    Raises:
        ValueError: a compressed file is damaged; the message names it.
    """
    if suffix_of(path) in COMPRESSED:
        yield from _read_compressed_lines(path)
        return
    with path.open("rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()
        while (offset := file.tell()) < stop:
            yield offset, file.readline()


def _read_compressed_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Read the lines of a gzip (`.gz`) or Zstandard (`.zst`) file, of one frame or several."""
    damages: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error)
    with ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        if path.suffix == ".zst":
            damages = (EOFError, _zstandard(path).ZstdError)
            raw = _ZstdFile(file, path)
        else:
            raw = gzip.GzipFile(fileobj=file)
        lines = stack.enter_context(io.BufferedReader(raw, _READ_BYTES))
        offset = 0
        try:
            while line := lines.readline():
                yield offset, line
                offset += len(line)
        except damages as err:
            raise ValueError(
                f"corpus.path: {path} -> cannot be decompressed after {offset} bytes of text "
                f"({err}) -> the file is damaged or cut short: fetch it again"
            ) from err


class _ZstdFile(io.RawIOBase):
    """The decompressed bytes of a file; zstandard's own reader passes over a missing end."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._decompressor = _zstandard(path).ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
        self._frame: Any = None
        self._compressed = self._content = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._content:
            self._compressed = self._compressed or self._file.read(_ZSTD_READ_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("its last frame has no end")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._content = self._frame.decompress(self._compressed)
            self._compressed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._content))
        buffer[:size], self._content = self._content[:size], self._content[size:]
        return size


def _zstandard(path: Path) -> Any:
    try:
        import zstandard  # rarely needed
    except ImportError as err:
        raise ValueError(
            f"corpus.path: {path} -> reading it needs the package zstandard, which is missing -> "
            "pip install trainyard[data], or decompress the file"
        ) from err
    return zstandard
