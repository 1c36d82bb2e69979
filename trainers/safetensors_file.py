"""Safetensors files written and read in the memory of one tensor.

The format is https://huggingface.co/docs/safetensors: the length of a header in 8 bytes, the header
in JSON (name, dtype, shape, place of each tensor), the values. The library of that name wants all
tensors of a file in memory to write it, and maps files to read them, where this writes one tensor
after another, digests the bytes on their way, and reads runs of elements; both while other threads
go on. What it writes the library reads, and the other way round.
"""

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from trainers.durable_files import new_digest

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK = 2**22
"""Bytes that are written and digested at a time."""
MAX_HEADER = 100 * 2**20
"""Bytes of the longest header that is read, as in the library."""


@dataclass(frozen=True)
class Entry:
    """A tensor to write.

    Attributes:
        key: Its name in the file.
        dtype: Of the tensor.
        shape: Likewise.
        read: Gives it, on the CPU, when its turn has come.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Place:
    """Where a tensor is in a file: dtype, shape, and the first byte."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


def write_tensors(path: Path, entries: Iterable[Entry]) -> dict[str, Any]:
    """Write a file, and sync it to disk.

    Returns:
        `bytes`, and `blake2b`, a digest of 32 bytes in hexadecimal.

    Raises:
        OSError: The file system refused.
        ValueError: A tensor is not as its entry says.
    """
    entries = list(entries)
    digest = new_digest()
    with path.open("wb", buffering=0) as file:
        _write(file, _header(entries), digest)
        for entry in entries:
            tensor = entry.read()
            if (tensor.dtype, tuple(tensor.shape)) != (entry.dtype, tuple(entry.shape)):
                raise ValueError(f"{entry.key} -> {tensor.dtype} {list(tensor.shape)} to write")
            _write(file, bytes_of(tensor), digest)
            del tensor  # before the next is read
        size = file.tell()
        os.fsync(file.fileno())
    return {"bytes": size, "blake2b": digest.hexdigest()}


def _header(entries: list[Entry]) -> memoryview:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + entry.dtype.itemsize * math.prod(entry.shape)
        header[entry.key] = {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that values are aligned
    return memoryview(len(text).to_bytes(8, "little") + text)


def _write(file: BinaryIO, content: memoryview, digest: Any) -> None:
    for start in range(0, len(content), CHUNK):
        chunk = content[start : start + CHUNK]
        digest.update(chunk)
        while chunk:  # a disk that fills up takes a part first
            chunk = chunk[file.write(chunk) :]


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor; not a copy."""
    flat: Any = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(flat)


class TensorFile:
    """A file to read from; it is open only while something is read.

    Attributes:
        places: Name -> where the tensor is.
    """

    def __init__(self, path: Path):
        """Read the header.

        Raises:
            ValueError: There is no such file, it has no header, or one that does not fit it.
        """
        self.path = path
        try:
            size = path.stat().st_size
        except FileNotFoundError as error:
            raise ValueError(f"{path} -> it is missing -> restore it") from error
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise ValueError(f"{path} -> no safetensors file, or cut short -> restore it")
            text = file.read(length)
        try:
            self.places = _read_places(json.loads(text), 8 + length, size)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} -> damaged header ({error}) -> restore it") from error

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read elements [start, stop) of the flattened tensor `key`, a 1-D tensor on the CPU.

        Raises:
            ValueError: As `read_into`.
        """
        place = self._place(key)
        tensor = torch.empty((place.numel if stop is None else stop) - start, dtype=place.dtype)
        self.read_into(tensor, key, start)
        return tensor

    def read_into(self, tensor: Tensor, key: str, start: int = 0) -> None:
        """Fill a contiguous 1-D CPU tensor with elements of the flattened `key` from `start` on.

        Raises:
            ValueError: The file has no such elements, or ends before.
        """
        place = self._place(key)
        if tensor.dtype != place.dtype or not 0 <= start <= start + len(tensor) <= place.numel:
            raise ValueError(
                f"{self.path} -> {key} is {place.numel} of {place.dtype} and not what is asked for "
                f"({len(tensor)} of {tensor.dtype} from {start} on) -> restore it"
            )
        rest = bytes_of(tensor)
        with self.path.open("rb", buffering=0) as file:
            file.seek(place.offset + start * place.dtype.itemsize)
            while rest:
                count = file.readinto(rest)
                if not count:
                    raise ValueError(f"{self.path} -> it ends within {key} -> restore it")
                rest = rest[count:]

    def _place(self, key: str) -> Place:
        if key not in self.places:
            raise ValueError(f"{self.path} -> it has no {key} -> restore it")
        return self.places[key]


def _read_places(header: dict[str, Any], start: int, size: int) -> dict[str, Place]:
    """Where tensors are; as in the library they lie side by side and fill the file."""
    places: dict[str, Place] = {}
    ends: list[tuple[int, int]] = []
    for key, facts in header.items():
        if key == "__metadata__":
            continue
        first, last = facts["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (first, *facts["shape"])):
            raise ValueError(f"{key} has no whole numbers for offsets or shape")
        place = Place(DTYPES[facts["dtype"]], tuple(facts["shape"]), start + first)
        if last - first != place.numel * place.dtype.itemsize:
            raise ValueError(f"{key} has other bytes than its shape needs")
        places[key] = place
        ends.append((first, last))
    end = 0
    for first, last in sorted(ends):
        if first != end:
            raise ValueError(f"tensors overlap, or leave a gap, at byte {first} of the values")
        end = last
    if end != size - start:
        raise ValueError(f"{end} bytes of values are named, and {size - start} are there")
    return places
