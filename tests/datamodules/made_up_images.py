"""Corpora of made-up images, and what their shards hold, read by webdataset and Pillow alone."""

import gzip
import io
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datamodules.facts import PreparedData
from datamodules.image_corpora import ImageCorpus
from datamodules.images import ImageDataModule
from datamodules.prepared import PreparedCorpus
from tests.datamodules.by_hand import read_with_webdataset
from tests.datamodules.stream_settings import STREAM

Seen = Counter[tuple[bytes, tuple[int, ...], int | None]]
"""Pixels, shape and label."""


def make_images(path: Any, **settings: Any) -> ImageCorpus:
    defaults: dict[str, Any] = {
        "name": "images",
        "path": path if isinstance(path, list) else str(path),
        "val_path": None,
        "test_path": None,
        "labels": True,
        "label_key": "label",
        "resolution": None,
        "resize": "lanczos",
        "channels": None,
        "format": "png",
        "jpeg_quality": 95,
        "on_bad_image": "raise",
        "val_fraction": 0.2,
        "test_fraction": 0.2,
        "shard_mb": 1 / 256,
        "num_processes": 1,
        "seed": 0,
    }
    return ImageCorpus(**{**defaults, **settings})


def make_data(
    corpus: Any, rank: int = 0, world: int = 1, state: Any = None, **own: Any
) -> ImageDataModule:
    class OfRank(ImageDataModule):
        @property
        def rank(self) -> int:
            return rank

        @property
        def world_size(self) -> int:
            return world

    settings: dict[str, Any] = {
        "corpus": as_it_is(corpus) if isinstance(corpus, PreparedData) else corpus,
        "data_dir": "unused",
        "resolution": 8,
        "channels": 3,
        "resize": "none",
        "flip": False,
        "eval_images": 5,
        "batch_samples": 12,
        "micro_batch": 2,
        "max_samples": 240,
        **STREAM,
    }
    data = OfRank(**{**settings, "tail": "carry", **own})
    if state is not None:
        data.load_state_dict(state)
    return data


def as_it_is(prepared: PreparedData) -> PreparedCorpus:
    return PreparedCorpus(name="prepared", path=str(prepared.path), storage_options={})


def draw_pixels(number: int, height: int = 8, width: int = 8, channels: int = 3) -> NDArray:
    """Pixels of which no two numbers have the same; uint8 [H, W, C]."""
    return np.random.default_rng(number).integers(0, 256, (height, width, channels), np.uint8)


def picture(pixels: NDArray) -> Image.Image:
    return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_folder(root: Path, num_images: int = 60, classes: tuple[str, ...] = ("b", "a c")) -> Path:
    """Colour PNGs of 8 x 8 pixels, number n in the subfolder of class n modulo their number."""
    for number in range(num_images):
        path = root / classes[number % len(classes)] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture(draw_pixels(number))))
    return root


def write_idx(path: Path, array: NDArray[np.uint8]) -> None:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    content = header + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def read_members(prepared: PreparedData, split: str) -> list[dict[str, bytes]]:
    shards = sorted((prepared.path / split).glob("*.tar"))
    return [sample for shard in shards for sample in read_with_webdataset(shard)]


def read_images(prepared: PreparedData, *splits: str) -> Seen:
    """Images of some splits, of all by default."""
    seen: Seen = Counter()
    for split in splits or ("train", "val", "test"):
        for sample in read_members(prepared, split):
            if "npy" in sample:
                pixels = np.load(io.BytesIO(sample["npy"]))
            else:
                (name,) = sample.keys() & {"png", "jpg"}
                pixels = np.asarray(Image.open(io.BytesIO(sample[name])))
            label = int(sample["cls"]) if "cls" in sample else None
            seen[pixels.tobytes(), _without_one(pixels.shape), label] += 1
    return seen


def seen(images: list[tuple[Any, int | None]]) -> Seen:
    """The same of images that are in memory."""
    arrays = [(np.asarray(image), label) for image, label in images]
    return Counter((a.tobytes(), _without_one(a.shape), label) for a, label in arrays)


def _without_one(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if shape[2:] == (1,) else shape
