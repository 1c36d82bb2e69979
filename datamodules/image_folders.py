"""A folder of image files, whose subfolders are classes, or whose `dataset.json` says the class."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datamodules.image_files import SUFFIXES, SourceImage
from datamodules.sources import SourceFile

LABELS_FILE = "dataset.json"
_SPLITS = {"train", "val", "valid", "validation", "test"}


@dataclass(frozen=True)
class FolderPiece:
    """Some files.

    Attributes:
        files: path and label of each.
        num_bytes: size of all.
    """

    files: tuple[tuple[Path, int | None], ...]
    num_bytes: int

    def read(self) -> Iterator[SourceImage]:
        """Read the files in order."""
        for path, label in self.files:
            yield SourceImage(path.read_bytes(), False, label, str(path))


def list_folder(
    key: str, root: Path, *, has_labels: bool, known_classes: list[str] | None
) -> tuple[list[SourceFile], dict[str, int | None], list[str] | None]:
    """List the images below a folder, outside of hidden ones.

    Args:
        key: of the configuration, for messages.
        root: the folder.
        has_labels: whether labels are looked for.
        known_classes: names of the classes of another folder, which are those of this one too.

    Returns:
        The files by name, with `dataset.json` if it is one of them; label of each image by name;
        names of the classes, sorted, None where they have none.

    Raises:
        ValueError: there are no images, or it cannot be told which class each is of.
    """
    files = sorted(walk_images(root), key=lambda file: file.name)
    if not files:
        raise ValueError(
            f"corpus.{key}={root} -> holds no image: no file ending in {', '.join(SUFFIXES)}, no "
            "shard and no IDX file -> check the path"
        )
    if has_labels and (root / LABELS_FILE).exists():
        labels = _read_labels(key, root, [file.name for file in files])
        return [*files, SourceFile(LABELS_FILE, root / LABELS_FILE)], labels, None
    folders = {file.name: file.name.rpartition("/")[0].partition("/")[0] for file in files}
    classes = sorted(set(folders.values()))
    if not has_labels or classes == [""]:
        return files, dict.fromkeys(folders), None
    _check_classes(key, root, folders, known_classes)
    classes = known_classes or classes
    numbers = {name: number for number, name in enumerate(classes)}
    return files, {name: numbers[folder] for name, folder in folders.items()}, classes


def cut_folder(
    files: list[SourceFile], labels: dict[str, int | None], unit_bytes: int, seed: int
) -> list[FolderPiece]:
    """Cut files into pieces of about `unit_bytes`, in an order of hashed names.

    By name a shard would be of one class, and a shuffle mixes few shards at a time.
    """
    key = seed.to_bytes(8, "little")

    def place(file: SourceFile) -> bytes:
        return hashlib.blake2b(file.name.encode(), digest_size=16, key=key).digest()

    pieces: list[list[tuple[Path, int | None]]] = []
    sizes: list[int] = []
    for file in sorted((file for file in files if file.name in labels), key=place):
        size = file.path.stat().st_size
        if not sizes or sizes[-1] + size > unit_bytes:
            pieces.append([])
            sizes.append(0)
        pieces[-1].append((file.path, labels[file.name]))
        sizes[-1] += size
    return [FolderPiece(tuple(own), size) for own, size in zip(pieces, sizes, strict=True)]


def walk_images(root: Path) -> Iterator[SourceFile]:
    """Find the image files below a folder, outside of hidden ones."""
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                path = Path(folder, name)
                yield SourceFile(path.relative_to(root).as_posix(), path)


def _read_labels(key: str, root: Path, names: list[str]) -> dict[str, int | None]:
    """Read `dataset.json` as StyleGAN writes it: `labels` is a list of name and number, or null."""
    path = root / LABELS_FILE
    try:
        listed = json.loads(path.read_bytes())["labels"]
        if listed is None:
            return dict.fromkeys(names)
        labels = dict(listed)
    except (ValueError, KeyError, TypeError) as err:
        raise ValueError(
            f"corpus.{key}={root} -> {LABELS_FILE} holds no list `labels` of [name, number] -> "
            "correct it, or set corpus.labels=false"
        ) from err
    if unlike := sorted(set(names) ^ labels.keys()):
        problem = "has no label" if unlike[0] in names else "is not there"
        raise ValueError(
            f"corpus.{key}={root} -> {unlike[0]} {problem}, the first of {len(unlike)} images in "
            f"which the folder and {LABELS_FILE} differ -> restore them, or set corpus.labels=false"
        )
    for name, label in labels.items():
        if not isinstance(label, int) or isinstance(label, bool):
            raise ValueError(
                f"corpus.{key}={root} -> the label of {name} in {LABELS_FILE} is {label!r}, no "
                "number of a class -> correct it, or set corpus.labels=false"
            )
    return labels


def _check_classes(
    key: str, root: Path, folders: dict[str, str], known_classes: list[str] | None
) -> None:
    classes = set(folders.values())
    if "" in classes:
        lone = next(name for name, folder in folders.items() if not folder)
        raise ValueError(
            f"corpus.{key}={root} -> {lone} lies beside subfolders with images, so that its class "
            "cannot be told -> move it into one, or set corpus.labels=false"
        )
    if classes <= _SPLITS:
        raise ValueError(
            f"corpus.{key}={root} -> its subfolders {', '.join(sorted(classes))} look like splits "
            "rather than classes -> give them as corpus.path, corpus.val_path and corpus.test_path"
        )
    if known_classes is not None and (new := sorted(classes - set(known_classes))):
        raise ValueError(
            f"corpus.{key}={root} -> corpus.path has no class {', '.join(new)} -> nothing could be "
            "trained on them: leave these folders out, or add such to corpus.path"
        )
