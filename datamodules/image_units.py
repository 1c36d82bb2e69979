"""The parallel half of preparing images: pieces of a source to shards, one piece a process.

A sample is a member `png`, `jpg` or `npy`, and a member `cls` with the number of its class.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datamodules.image_files import FORMATS, ImageForm, SourceImage
from datamodules.image_sources import ImagePiece
from datamodules.index import ShardFacts, write_atomically
from datamodules.preparation import UNITS_FOLDER
from datamodules.processes import run_tasks
from datamodules.units import SPLITS, has_shard, load_facts, split_of
from datamodules.write import ShardWriter

RAISE, DROP = "raise", "drop"
MOST_CLASSES = 2**16
"""Labels are numbers below this: tables of classes have a row for each."""


@dataclass(frozen=True)
class ImageTask:
    """A piece, and how it becomes at most one shard per split.

    Attributes:
        number: from which its shards have their names.
        piece: the images.
        split: where they go; None where each is assigned by its content.
        form: what is stored.
        folder: of the prepared corpus.
        fractions: share of each split.
        seed: key of the assignment to splits.
        on_bad_image: `raise` or `drop`.
    """

    number: int
    piece: ImagePiece
    split: str | None
    form: ImageForm
    folder: Path
    fractions: Mapping[str, float]
    seed: int
    on_bad_image: str

    @property
    def num_bytes(self) -> int:
        """Size of the images in their source."""
        return self.piece.num_bytes

    @property
    def facts(self) -> Path:
        """File that says that the task is done and what its shards hold."""
        return self.folder / UNITS_FOLDER / f"{self.number:06d}.json"


@dataclass
class ImageCounts:
    """What is known of some images.

    Attributes:
        labels: images of each class.
        num_images: of all classes and of none.
        shapes: H, W and C that occur.
    """

    labels: Counter[int] = field(default_factory=Counter)
    num_images: int = 0
    shapes: set[tuple[int, int, int]] = field(default_factory=set)

    def add(self, label: int | None, shape: tuple[int, int, int]) -> None:
        """Count an image."""
        self.num_images += 1
        self.shapes.add(shape)
        if label is not None:
            self.labels[label] += 1


@dataclass
class MergedImages:
    """The shards of one split over all tasks.

    Attributes:
        shards: in the order of the tasks.
        counts: of the images in them.
    """

    shards: list[ShardFacts] = field(default_factory=list)
    counts: ImageCounts = field(default_factory=ImageCounts)


def store_images(tasks: list[ImageTask], num_processes: int | None, title: str) -> None:
    """Store what is not stored yet, in parallel, under a progress bar.

    The result does not depend on the number of processes, nor on how often it was interrupted.
    """
    run_tasks(_store, tasks, num_processes, title, done=_is_stored)


def merge_images(tasks: Sequence[ImageTask]) -> tuple[dict[str, MergedImages], int]:
    """Put the shards of all tasks together; splits without images lack.

    Returns:
        The splits by name, and how many images were dropped.
    """
    merged: dict[str, MergedImages] = {split: MergedImages() for split in SPLITS}
    num_bad = 0
    for task in tasks:
        found = json.loads(task.facts.read_bytes())
        num_bad += found["num_bad"]
        for split, part in found["splits"].items():
            counts = merged[split].counts
            merged[split].shards.append(load_facts(part["facts"]))
            counts.labels.update({int(label): n for label, n in part["labels"].items()})
            counts.num_images += part["num_images"]
            counts.shapes.update(map(tuple, part["shapes"]))
    return {split: part for split, part in merged.items() if part.shards}, num_bad


def schema_of(form: ImageForm, has_labels: bool) -> dict[str, dict[str, str]]:
    """Give the members of a sample, as `datamodules.index.Index` has them."""
    names = [FORMATS[form.format], "cls"] if has_labels else [FORMATS[form.format]]
    return {name: {"codec": name} for name in names}


def _store(task: ImageTask) -> None:
    """Read, convert and write the images of a task, then its facts."""
    writers: dict[str, ShardWriter] = {}
    counts: dict[str, ImageCounts] = {}
    num_bad = 0
    with ExitStack() as stack:
        for image in task.piece.read():
            _check_label(image)
            try:
                stored, shape = task.form.make(image)
            except ValueError as err:
                num_bad += 1
                if task.on_bad_image == DROP:
                    continue
                raise ValueError(
                    f"corpus.on_bad_image=raise: {image.place} -> {err} -> restore it, leave it "
                    "out, or set corpus.on_bad_image=drop"
                ) from err
            split = task.split or split_of(image.identity, task.fractions, task.seed)
            if split not in writers:
                path = task.folder / split / f"{split}-{task.number:06d}.tar"
                path.parent.mkdir(exist_ok=True)
                writers[split] = stack.enter_context(ShardWriter(path))
                counts[split] = ImageCounts()
            members = {FORMATS[task.form.format]: stored}
            if image.label is not None:
                members["cls"] = str(image.label).encode()
            writers[split].write(_size(stored), members)
            counts[split].add(image.label, shape)
        splits = {
            split: {
                "facts": asdict(writer.finish()),
                "labels": counts[split].labels,
                "num_images": counts[split].num_images,
                "shapes": sorted(counts[split].shapes),
            }
            for split, writer in writers.items()
        }
    task.facts.parent.mkdir(parents=True, exist_ok=True)
    content = {"num_bad": num_bad, "splits": splits}
    write_atomically(task.facts, json.dumps(content).encode())


def _is_stored(task: ImageTask) -> bool:
    """Tell whether an earlier preparation left this task complete, by the bytes of its shards."""
    return task.facts.exists() and all(
        has_shard(task.folder / split, part["facts"])
        for split, part in json.loads(task.facts.read_bytes())["splits"].items()
    )


def _check_label(image: SourceImage) -> None:
    if image.label is not None and not 0 <= image.label < MOST_CLASSES:
        raise ValueError(
            f"corpus: {image.place} -> its label is {image.label}, and classes are numbered from 0 "
            f"to {MOST_CLASSES - 1:,} at most -> correct it, or set corpus.labels=false"
        )


def _size(stored: Any) -> int:
    return len(stored) if isinstance(stored, bytes) else stored.nbytes
