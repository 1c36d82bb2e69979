"""Readers of images: incompressible bytes, hashed where the reader puts them.

memory map      one flat file in sequence, views
ours            `datamodules.samples.StoredSamples`: shuffled, resumable, views of the shards
ours, copied    the same with a codec that copies every image into an array
webdataset      the stock library on the same shards in sequence, copies
webdataset, shuffled    the same with its shard shuffle and a buffer of 1000 images

Views are views of the page cache; what follows, such as a decoder, reads them as the hash does.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from webdataset.compat import WebDataset

from benchmarks.stream_tokens import endless
from benchmarks.turns import DIGEST_BITS, Reader, Side, touch_images
from datamodules.index import Index, read_index, write_index
from datamodules.samples import StoredSamples
from datamodules.write import ShardWriter

NUM_SHARDS = 8


class RawBytes:
    """A codec that hands over the stored bytes; `datamodules.samples.Codec`.

    Args:
        member: extension.
        copies: make arrays of their own, else views of the shard.
    """

    def __init__(self, member: str, *, copies: bool) -> None:
        self._member, self._copies = member, copies

    def decode(self, members: Mapping[str, memoryview], key: np.uint64 | None) -> Any:
        """Give the content of the one member; uint8 [bytes]."""
        content = np.frombuffer(members[self._member], np.uint8)
        return content.copy() if self._copies else content

    def collate(self, samples: Sequence[Any]) -> list[Any]:
        """Give them as they are."""
        return list(samples)

    def pad(self, batch: list[Any], num_samples: int) -> None:
        """Take those from `num_samples` on out."""
        del batch[num_samples:]


def write_images(folder: Path, num_images: int, num_bytes: int) -> tuple[Index, int]:
    """Write the same random bytes as shards and as one flat file, `images.bin`.

    Returns:
        The index, and the sum of the images' digests.
    """
    rng = np.random.default_rng(0)
    facts, digest = [], 0
    (data := folder / "train").mkdir()
    with (folder / "images.bin").open("wb") as file:
        for numbers in np.array_split(np.arange(num_images), NUM_SHARDS):
            with ShardWriter(data / f"train-{len(facts):06d}.tar") as writer:
                for _ in numbers:
                    image = rng.bytes(num_bytes)
                    digest += xxhash.xxh3_64_intdigest(image)
                    writer.write(num_bytes, {"jpg": image})
                    file.write(image)
                facts.append(writer.finish())
    write_index(data, schema={"jpg": {"codec": "raw"}}, tokenizer=None, shards=facts)
    return read_index(data), digest & DIGEST_BITS


def memory_map(flat: Path, num_bytes: int, batch: int) -> Iterator[Any]:
    """Give one epoch of views."""
    images = np.memmap(flat, np.uint8, "r").view(np.ndarray).reshape(-1, num_bytes)
    for start in range(0, len(images), batch):
        yield list(images[start : start + batch])


def stock(index: Index, batch: int, *, shuffled: bool) -> Callable[[], Any]:
    """Give what webdataset yields, an epoch at each call."""
    urls = [shard.url for shard in index.shards]
    shards = WebDataset(urls, shardshuffle=len(urls) if shuffled else False, empty_check=False)
    samples: Any = shards.shuffle(1000) if shuffled else shards

    def epoch() -> Iterator[Any]:
        images = (sample["jpg"] for sample in samples)
        while found := list(islice(images, batch)):
            yield found

    return epoch


def image_sides(index: Index, flat: Path, num_bytes: int, batch: int) -> dict[str, Side]:
    """Give the readers."""

    def ours(copies: bool) -> Callable[[], Any]:
        return endless(StoredSamples(index, RawBytes("jpg", copies=copies), seed=0), batch)

    epochs: dict[str, Callable[[], Any]] = {
        "memory map": lambda: memory_map(flat, num_bytes, batch),
        "ours": ours(copies=False),
        "ours, copied": ours(copies=True),
        "webdataset": stock(index, batch, shuffled=False),
        "webdataset, shuffled": stock(index, batch, shuffled=True),
    }
    return {name: Reader(epoch, touch_images) for name, epoch in epochs.items()}
