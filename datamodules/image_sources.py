"""Where images come from: a folder of files, IDX files, tar shards, or scikit-learn's digits."""

import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from datamodules.foreign import SUFFIXES as SHARD_SUFFIXES
from datamodules.foreign import list_shards, open_archive
from datamodules.image_files import MEMBERS, SourceImage
from datamodules.image_folders import cut_folder, list_folder, walk_images
from datamodules.image_idx import cut_idx, find_idx, is_idx, labels_of
from datamodules.sources import SourceFile
from datamodules.tar import BadSampleError, StoredSample, check_members, read_samples

DIGITS = "builtin:digits"
_DIGITS_FILE = "datasets/data/digits.csv.gz"
_DIGITS_WHITE = 16  # in scikit-learn's digits


class ImagePiece(Protocol):
    """A part of a source that one process reads; can be pickled."""

    @property
    def num_bytes(self) -> int:
        """Size of its images in the source."""
        ...

    def read(self) -> Iterator[SourceImage]:
        """Read the images in order."""
        ...


@dataclass(frozen=True)
class ImageSource:
    """Images of one place.

    Attributes:
        files: that they are in.
        pieces: what is read.
        classes: names of the classes; None where they have none, or numbers alone.
    """

    files: list[SourceFile]
    pieces: Sequence[ImagePiece]
    classes: list[str] | None


@dataclass(frozen=True)
class ShardPiece:
    """The samples of a tar shard, grouped as webdataset does.

    Attributes:
        path: of the shard.
        label_key: field of a member `json` with the label, where there is no member `cls`.
        has_labels: whether labels are read.
    """

    path: Path
    label_key: str
    has_labels: bool

    @property
    def num_bytes(self) -> int:
        """Size of the shard."""
        return self.path.stat().st_size

    def read(self) -> Iterator[SourceImage]:
        """Read the images in order.

        Raises:
            ValueError: the shard is damaged, a sample has no image or several, or a label that is
                no number.
        """
        with open_archive(self.path) as archive:
            samples, error = read_samples(archive, 0, len(archive))
            for sample in samples:
                yield self._read(archive, sample)
            if error is not None:
                raise ValueError(f"corpus: {error} (shard {self.path})") from error

    def _read(self, archive: memoryview, sample: StoredSample) -> SourceImage:
        place = f"key {sample.key} of {self.path}"
        try:
            check_members(sample, {})
        except BadSampleError as err:
            raise ValueError(f"corpus: {err} ({place})") from err
        members = {
            name: bytes(archive[offset : offset + size])
            for name, (offset, size) in sample.members.items()
            if name in (*MEMBERS, "cls", "json")
        }
        images = [name for name in MEMBERS if name in members]
        if len(images) != 1:
            raise ValueError(
                f"corpus: {place} -> its members {', '.join(sorted(sample.members))} are not one "
                f"image ({', '.join(MEMBERS)}) and more -> leave the sample out, or write the "
                "shards anew"
            )
        label = self._label(members, place) if self.has_labels else None
        return SourceImage(members[images[0]], images[0] == "npy", label, place)

    def _label(self, members: dict[str, bytes], place: str) -> int | None:
        found: Any = None
        try:
            if "cls" in members:
                found = int(members["cls"])
            elif "json" in members:
                found = json.loads(members["json"]).get(self.label_key)
        except (ValueError, AttributeError) as err:
            raise ValueError(
                f"corpus: {place} -> it has no label that can be read ({err}) -> correct it, or "
                "set corpus.labels=false"
            ) from err
        if found is not None and (not isinstance(found, int) or isinstance(found, bool)):
            raise ValueError(
                f"corpus: {place} -> its {self.label_key} is {found!r}, no number of a class -> "
                "choose another corpus.label_key, or set corpus.labels=false"
            )
        return found


@dataclass(frozen=True)
class DigitsPiece:
    """The 1,797 handwritten digits of `sklearn.datasets.load_digits`, 8 x 8 pixels.

    Attributes:
        num_bytes: size of their file.
        has_labels: whether labels are read.
    """

    num_bytes: int
    has_labels: bool

    def read(self) -> Iterator[SourceImage]:
        """Read them in order; their 17 shades from 0 to 16 become 0 to 255."""
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        pixels = np.rint(digits.images * (255 / _DIGITS_WHITE)).astype(np.uint8)
        for number, (image, label) in enumerate(zip(pixels, digits.target.tolist(), strict=True)):
            place = f"digit {number} of {DIGITS}"
            yield SourceImage(image, False, label if self.has_labels else None, place)


def list_images(
    key: str,
    path: str | Sequence[str],
    *,
    has_labels: bool,
    label_key: str,
    unit_bytes: int,
    seed: int,
    known_classes: list[str] | None = None,
) -> ImageSource:
    """Find the images of a split, without reading them.

    Args:
        key: of the configuration, for messages.
        path: folder of images, of shards, or of IDX files (of which the training images are meant);
            a shard, a glob or a list of shards; an IDX file; or `builtin:digits`.
        has_labels: whether labels are read.
        label_key: field of a shard's member `json` with the label.
        unit_bytes: of a piece, about; a shard is one piece whatever its size.
        seed: key of the order of files of a folder.
        known_classes: of the source that models are trained on, where this is another.

    Raises:
        ValueError: there are no images, or it cannot be told which class they are of.
    """
    if path == DIGITS:
        file = _find_digits()
        piece = DigitsPiece(file.stat().st_size, has_labels)
        return ImageSource([SourceFile(file.name, file)], [piece], None)
    if isinstance(path, str):
        root = Path(path)
        if root.is_dir() and (found := find_idx(root)):
            root = found.get("train", next(iter(found.values())))
        if root.is_file() and is_idx(root):
            labels = labels_of(root) if has_labels else None
            both = [root] if labels is None else [root, labels]
            pieces = cut_idx(root, labels, unit_bytes)
            return ImageSource([SourceFile(p.name, p.resolve()) for p in both], pieces, None)
        if root.is_dir() and not _has_shards(key, root):
            files, classes_of, classes = list_folder(
                key, root, has_labels=has_labels, known_classes=known_classes
            )
            folder_pieces = cut_folder(files, classes_of, unit_bytes, seed)
            return ImageSource(files, folder_pieces, classes)
        if not root.exists() and not path.endswith(SHARD_SUFFIXES) and not has_magic(path):
            raise ValueError(
                f"corpus.{key}={path} -> no such file or folder -> give a folder of images, an IDX "
                f"file, tar shards, or {DIGITS}"
            )
    shards = list_shards(path, key=f"corpus.{key}")
    names = [SourceFile(f"{number:06d}/{s.name}", s) for number, s in enumerate(shards)]
    return ImageSource(names, [ShardPiece(s, label_key, has_labels) for s in shards], None)


def find_test(path: str | Sequence[str]) -> str | None:
    """Find the test images beside the training images in a folder of IDX files, if it is one."""
    if not isinstance(path, str) or not Path(path).is_dir():
        return None
    found = find_idx(Path(path))
    return str(found["test"]) if found.keys() == {"train", "test"} else None


def _has_shards(key: str, folder: Path) -> bool:
    shards = [path for path in folder.iterdir() if path.name.endswith(SHARD_SUFFIXES)]
    if shards and (image := next(walk_images(folder), None)) is not None:
        raise ValueError(
            f"corpus.{key}={folder} -> holds shards ({shards[0].name}) and images ({image.name}) "
            "-> which are meant cannot be told -> move one of them elsewhere"
        )
    return bool(shards)


def _find_digits() -> Path:
    # Found without an import, which takes a second, and at every start of a run.
    package = importlib.util.find_spec("sklearn")
    folders = package.submodule_search_locations if package else None
    if not folders or not (file := Path(folders[0], _DIGITS_FILE)).exists():
        raise ValueError(
            f"corpus.path={DIGITS} -> scikit-learn, which has them, is not installed -> "
            "pip install scikit-learn"
        )
    return file
