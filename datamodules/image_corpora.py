"""A corpus of images: from files, shards of others, or IDX files to tar shards, once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datamodules.facts import IMAGES, PreparedData
from datamodules.image_files import FILTERS, FORMATS, ImageForm
from datamodules.image_sources import ImageSource, find_test, list_images
from datamodules.image_units import (
    DROP,
    RAISE,
    ImageTask,
    MergedImages,
    merge_images,
    schema_of,
    store_images,
)
from datamodules.index import write_index
from datamodules.preparation import check_shares, check_splits, fractions_of, prepare_once
from datamodules.units import SPLITS

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ImageCorpus:
    """Images and how to prepare them; making one does not touch the disk.

    Images of `path` go to an evaluation split without a path of its own where a keyed hash of their
    content sends them, so that equal images never face each other across these splits.

    Args:
        name: of the corpus, the first part of the name of its folder.
        path: a folder of images, whose subfolders are classes unless it has StyleGAN's
            `dataset.json`; a folder of IDX files with MNIST's names, or one of them; tar shards, as
            a folder, a glob or a list; or `builtin:digits`, those of scikit-learn.
        val_path: the same for the images of `val`; None takes some of `path`.
        test_path: the same for `test`. A folder of IDX files has its own.
        labels: whether classes are kept, where there are any.
        label_key: field of a member `json` of shards with the label, where they have no `cls`.
        resolution: rows and columns that the central square of each image is resized to; None
            leaves sizes as they are.
        resize: filter: `bilinear`, `bicubic`, `lanczos` or `box`.
        channels: 1 or 3, which images are converted to; None: those that all of them have.
        format: `png`, `jpeg`, or `raw`: uint8 [H, W, C] as `.npy`, largest and quickest to read.
        jpeg_quality: 1 to 100, of images that are encoded as `jpeg`.
        on_bad_image: `raise`, or `drop` those that cannot be read.
        val_fraction: share of `path` that goes to `val`.
        test_fraction: the same for the test split; 0 makes none.
        shard_mb: images of a shard in their source, in MiB. Shards stay one shard each.
        num_processes: processes that convert; None takes a process per core.
        seed: key of the assignment to splits, and of the order of files.
    """

    name: str
    path: str | Sequence[str]
    val_path: str | Sequence[str] | None
    test_path: str | Sequence[str] | None
    labels: bool
    label_key: str
    resolution: int | None
    resize: str
    channels: int | None
    format: str
    jpeg_quality: int
    on_bad_image: str
    val_fraction: float
    test_fraction: float
    shard_mb: float
    num_processes: int | None
    seed: int

    def prepare(self, data_dir: str | Path) -> PreparedData:
        """Prepare the corpus below `data_dir`, or find it there.

        Several processes may ask at once: one works, the others wait and take its result.

        Returns:
            Where the data is and what it is.

        Raises:
            ValueError: there are no images, one cannot be read, labels are missing or impossible,
                a split is empty, or a setting is impossible; the message names the key or place.
        """
        self._check()
        sources = self._list()
        files = [file for source in sources.values() for file in source.files]
        build = partial(self._build, sources)
        return prepare_once(self.name, data_dir, files, self._settings(sources), build)

    def _check(self) -> None:
        check_shares(self)
        choices: dict[str, Sequence[Any]] = {
            "resize": list(FILTERS),
            "format": list(FORMATS),
            "on_bad_image": (RAISE, DROP),
            "channels": (1, 3, None),
            "labels": (True, False),
            "jpeg_quality": range(1, 101),
        }
        for key, allowed in choices.items():
            if (value := getattr(self, key)) not in allowed:
                given = "1 to 100" if key == "jpeg_quality" else ", ".join(map(str, allowed))
                raise ValueError(
                    f"corpus.{key}={value} -> no such setting -> choose one of {given}"
                )
        if self.resolution is not None and not (
            isinstance(self.resolution, int) and self.resolution >= 1
        ):
            raise ValueError(
                f"corpus.resolution={self.resolution} -> it is a number of pixels -> use 1 or "
                "more, or null to leave images as they are"
            )

    @property
    def _paths(self) -> dict[str, str | list[str]]:
        """Where the images of each split are, `train` first; plain strings and lists."""
        test = find_test(self.path)
        if test is not None and self.test_path is not None:
            raise ValueError(
                f"corpus.test_path={self.test_path} -> {self.path} has test images of its own "
                f"({test}) -> give its file of training images as corpus.path, or no test_path"
            )
        given = {"train": self.path, "val": self.val_path, "test": self.test_path or test}
        return {
            split: path if isinstance(path, str) else list(path)
            for split, path in given.items()
            if path is not None
        }

    def _list(self) -> dict[str, ImageSource]:
        found: dict[str, ImageSource] = {}
        for split, path in self._paths.items():
            found[split] = list_images(
                "path" if split == "train" else f"{split}_path",
                path,
                has_labels=self.labels,
                label_key=self.label_key,
                unit_bytes=int(self.shard_mb * 2**20),
                seed=self.seed,
                known_classes=found["train"].classes if found else None,
            )
            if found[split].classes != found["train"].classes:
                raise ValueError(
                    f"corpus.{split}_path={path} -> of corpus.path={self.path} and of it only one "
                    "names its classes by folders -> use folders of the same names for both, or "
                    "set corpus.labels=false"
                )
        return found

    def _settings(self, sources: dict[str, ImageSource]) -> dict[str, Any]:
        """Collect what the bytes of the prepared data depend on, besides the sources."""
        fractions = fractions_of(self, sources)
        settings = {
            "version": FORMAT_VERSION,
            "kind": IMAGES,
            "files": {split: len(source.files) for split, source in sources.items()},
            "val_fraction": fractions["val"],
            "test_fraction": fractions["test"],
        }
        others = (
            *("labels", "label_key", "resolution", "resize", "channels", "format"),
            *("jpeg_quality", "on_bad_image", "shard_mb", "seed"),
        )
        return settings | {key: getattr(self, key) for key in others}

    def _build(self, sources: dict[str, ImageSource], path: Path) -> dict[str, Any]:
        fractions = fractions_of(self, sources)
        form = ImageForm(
            self.resolution, self.resize, self.channels, self.format, self.jpeg_quality
        )
        pieces = [
            (None if split == "train" else split, piece)
            for split, source in sources.items()
            for piece in source.pieces
        ]
        tasks = [
            ImageTask(n, piece, split, form, path, fractions, self.seed, self.on_bad_image)
            for n, (split, piece) in enumerate(pieces)
        ]
        store_images(tasks, self.num_processes, f"Preparing {self.name}")
        merged, num_bad = merge_images(tasks)
        classes = self._classes(merged, sources["train"].classes)
        self._check_merged(merged, fractions, sources)
        for split, part in merged.items():
            schema = schema_of(form, classes is not None)
            write_index(path / split, schema=schema, tokenizer=None, shards=part.shards)
        return {
            "kind": IMAGES,
            "num_classes": None if classes is None else len(classes),
            "classes": classes,
            **_count(merged, classes),
            "bad_images": num_bad,
            "settings": {"paths": self._paths, **self._settings(sources)},
        }

    def _check_merged(
        self,
        merged: dict[str, MergedImages],
        fractions: dict[str, float],
        sources: dict[str, ImageSource],
    ) -> None:
        check_splits(fractions, merged, str(self.path), self.seed)
        for split in sources:
            if split not in merged:
                raise ValueError(
                    f"corpus: {self._paths[split]} -> has no image that can be read -> give other "
                    f"images of {split}"
                )
        if len(found := {shape[2] for part in merged.values() for shape in part.counts.shapes}) > 1:
            raise ValueError(
                f"corpus.channels=null -> there are images of {' and of '.join(map(str, found))} "
                "channels, and models take one number of them -> set corpus.channels"
            )

    def _classes(
        self, merged: dict[str, MergedImages], names: list[str] | None
    ) -> list[str] | None:
        """Give the names of the classes, numbers where they have no names; None without labels."""
        num_images = sum(part.counts.num_images for part in merged.values())
        num_labels = sum(part.counts.labels.total() for part in merged.values())
        if num_labels == 0:
            return None
        if num_labels < num_images:
            raise ValueError(
                f"corpus.labels=true -> {num_images - num_labels:,} of {num_images:,} images have "
                "no label -> add theirs, or set corpus.labels=false"
            )
        largest = max(label for part in merged.values() for label in part.counts.labels)
        return names or [str(number) for number in range(largest + 1)]


def _count(merged: dict[str, MergedImages], classes: list[str] | None) -> dict[str, Any]:
    """Collect the facts by split; None where there is no such split, so that keys stay."""
    shapes = [shape for part in merged.values() for shape in part.counts.shapes]
    heights, widths, channels = zip(*shapes, strict=True)
    numbers = range(len(classes)) if classes else ()
    counts = {split: merged[split].counts if split in merged else None for split in SPLITS}
    return {
        "channels": channels[0],
        "resolution": {
            "min_height": min(heights),
            "max_height": max(heights),
            "min_width": min(widths),
            "max_width": max(widths),
        },
        "images": {split: found and found.num_images for split, found in counts.items()},
        "class_counts": {
            split: [found.labels[number] for number in numbers] if found and classes else None
            for split, found in counts.items()
        },
        "shards": {split: len(part.shards) for split, part in merged.items()},
    }
