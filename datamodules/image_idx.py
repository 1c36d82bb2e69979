"""Images in IDX files, the format of MNIST (LeCun, Cortes and Burges, http://yann.lecun.com/exdb/mnist).

A file is two zero bytes, the type of its elements (8: unsigned byte), the number of its dimensions,
the size of each as a big-endian 32-bit number, then the elements. `.gz` files are read as they are.
"""

import gzip
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from datamodules.image_files import SourceImage

_IMAGES = re.compile(r"(?P<part>.*)images(?P<end>[.-]idx3-ubyte)(?P<gz>\.gz)?$")
_BYTES = 8
_IMAGE_DIMS, _LABEL_DIMS = 3, 1
_TESTS = ("t10k", "test")


@dataclass(frozen=True)
class IdxPiece:
    """Some images of a file, uint8 [images, H, W].

    Attributes:
        images: the file.
        labels: that of their labels, uint8 [images]; None for none.
        start: number of the first image.
        stop: number of the image to stop before.
        shape: H and W.
    """

    images: Path
    labels: Path | None
    start: int
    stop: int
    shape: tuple[int, int]

    @property
    def num_bytes(self) -> int:
        """Size of the pixels."""
        return (self.stop - self.start) * self.shape[0] * self.shape[1]

    def read(self) -> Iterator[SourceImage]:
        """Read the images in order.

        Raises:
            ValueError: a file is cut short or damaged.
        """
        pixels = _read_rows(self.images, _IMAGE_DIMS, self.start, self.stop, self.shape)
        labels = None
        if self.labels is not None:
            labels = _read_rows(self.labels, _LABEL_DIMS, self.start, self.stop, ()).tolist()
        for number, image in enumerate(pixels):
            place = f"image {self.start + number} of {self.images}"
            yield SourceImage(image, False, labels[number] if labels else None, place)


def is_idx(path: Path) -> bool:
    """Tell whether a file is named as IDX files of images are."""
    return _IMAGES.match(path.name) is not None


def find_idx(folder: Path) -> dict[str, Path]:
    """Find the files of images in a folder by their standard names; `train` and `test` at most.

    Where there is one both compressed and not, the latter is taken.

    Raises:
        ValueError: two files are of the same split.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if (match := _IMAGES.match(path.name)) is None:
            continue
        split = "test" if any(name in match["part"] for name in _TESTS) else "train"
        known = found.setdefault(split, path)
        if path.name not in (known.name, f"{known.name}.gz"):
            raise ValueError(
                f"corpus.path={folder} -> {known.name} and {path.name} are both of the {split} "
                "split -> give the file as corpus.path, and another as corpus.test_path"
            )
    return found


def labels_of(images: Path) -> Path | None:
    """Find the file of labels that belongs to one of images; None where there is none."""
    match = _IMAGES.match(images.name)
    assert match is not None
    plain = f"{match['part']}labels{match['end'].replace('3', '1')}"
    both = (images.with_name(plain + end) for end in ("", ".gz"))
    return next((path for path in both if path.exists()), None)


def cut_idx(images: Path, labels: Path | None, unit_bytes: int) -> list[IdxPiece]:
    """Cut a file of images into pieces of about `unit_bytes`.

    Raises:
        ValueError: a file is none of this format, or they do not belong to each other.
    """
    count, *shape = _read_sizes(images, _IMAGE_DIMS)
    if labels is not None and (num_labels := _read_sizes(labels, _LABEL_DIMS)[0]) != count:
        raise ValueError(
            f"corpus: {images} -> it has {count:,} images, and {labels} {num_labels:,} labels -> "
            "they belong to different data sets: restore them"
        )
    height, width = shape
    step = max(1, unit_bytes // max(1, height * width))
    return [
        IdxPiece(images, labels, start, min(start + step, count), (height, width))
        for start in range(0, count, step)
    ]


def _open(path: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _read_sizes(path: Path, num_dims: int) -> tuple[int, ...]:
    with _open(path) as file:
        header = _read(file, 4 + 4 * num_dims, path)
    if header[:4] != bytes([0, 0, _BYTES, num_dims]):
        raise ValueError(
            f"corpus: {path} -> it begins with {header[:4].hex()}, an IDX file of "
            f"{num_dims} dimension{'s' * (num_dims > 1)} of bytes with "
            f"{bytes([0, 0, _BYTES, num_dims]).hex()} -> give another file, or convert it"
        )
    return struct.unpack(f">{num_dims}I", header[4:])


def _read_rows(
    path: Path, num_dims: int, start: int, stop: int, shape: tuple[int, ...]
) -> NDArray[np.uint8]:
    size = int(np.prod(shape, dtype=np.int64))
    with _open(path) as file:
        file.seek(4 + 4 * num_dims + start * size)
        content = _read(file, (stop - start) * size, path)
    return np.frombuffer(content, np.uint8).reshape(stop - start, *shape)


def _read(file: BinaryIO | gzip.GzipFile, size: int, path: Path) -> bytes:
    try:
        content = file.read(size)
    except (EOFError, gzip.BadGzipFile, zlib.error) as err:
        raise ValueError(
            f"corpus: {path} -> it cannot be decompressed ({err}) -> restore it"
        ) from err
    if len(content) != size:
        raise ValueError(
            f"corpus: {path} -> it ends {size - len(content):,} bytes before what its header says "
            "-> it is cut short: restore it"
        )
    return content
