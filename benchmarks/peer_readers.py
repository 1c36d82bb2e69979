"""The readers of litdata and mosaicml-streaming, run by the Python of an environment that has them.

    peers/bin/python -m benchmarks.peer_readers LIBRARY {tokens T B | images BYTES B} FOLDER

Started by `benchmarks.peers`. Writes the library's own format from the payload in FOLDER, says in a
line of JSON which readers there are, and answers each line `{"reader": ..., "batches": ...}` with
the fields of a `Turn`. Readers are iterated in this process, without their data loaders, and their
samples are put into batches here, which costs them least.

    litdata             chunks of 64 MB shuffled, and samples in them, as it does by default; tokens
                        by its `TokensLoader`, images as views of the chunk, without a copy
    mosaicml py1e, py1s MDS of one row of tokens or one image a sample, each copied
"""

# pyright: reportMissingImports=false
# The libraries are in the other environment.

import json
import os
import shutil
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from importlib.machinery import ModuleSpec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.turns import Reader, touch_images, touch_tokens

CHUNK_BYTES = "64MB"
MDS_ROWS = 50_000
"""Bound on rows of tokens written as samples of their own, which takes longer than reading them."""


def batches(dataset: Iterable[Any], size: int, stack: bool) -> Callable[[], Iterator[Any]]:
    """Give an epoch of a data set in batches, of tokens as int64 inputs and targets [B, T]."""

    def epoch() -> Iterator[Any]:
        samples = (sample for sample in dataset)  # some are iterators that islice would begin anew
        while found := list(islice(samples, size)):
            if stack:
                rows = torch.from_numpy(np.stack(found).astype(np.int64))
                yield rows[:, :-1], rows[:, 1:]
            else:
                yield found

    return epoch


def litdata_tokens(folder: Path, length: int) -> Iterable[Any]:
    """Write the tokens in pieces of a megabyte and give rows of T + 1."""
    import litdata
    from litdata.streaming.item_loader import TokensLoader
    from litdata.streaming.writer import BinaryWriter

    path = str(folder / "litdata")
    if not Path(path).exists():
        writer = BinaryWriter(path, chunk_bytes=CHUNK_BYTES, item_loader=TokensLoader())
        tokens = np.memmap(folder / "tokens.u16", np.uint16, "r")
        for number, start in enumerate(range(0, len(tokens), 2**19)):
            writer[number] = torch.from_numpy(np.array(tokens[start : start + 2**19]))
        writer.done()
        writer.merge(1)
    loader = TokensLoader(block_size=length + 1)
    return litdata.StreamingDataset(path, item_loader=loader, shuffle=True)


def litdata_images(folder: Path, num_bytes: int) -> Iterable[Any]:
    """Write every image as bytes."""
    import litdata
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(path := str(folder / "litdata"), chunk_bytes=CHUNK_BYTES)
    for number, image in enumerate(read_images(folder, num_bytes)):
        writer[number] = image
    writer.done()
    writer.merge(1)
    return litdata.StreamingDataset(path, shuffle=True)


def mosaic_tokens(folder: Path, length: int) -> Path:
    """Write rows of T + 1, slices of the text that overlap in a token, up to `MDS_ROWS`."""
    tokens = np.memmap(folder / "tokens.u16", np.uint16, "r")
    rows = (
        {"tokens": np.array(tokens[start : start + length + 1])}
        for start in range(0, min(len(tokens) - length, MDS_ROWS * length), length)
    )
    return write_mds(folder / f"mds-{length}", {"tokens": f"ndarray:uint16:{length + 1}"}, rows)


def mosaic_images(folder: Path, num_bytes: int) -> Path:
    """Write every image as bytes."""
    images = ({"image": image} for image in read_images(folder, num_bytes))
    return write_mds(folder / "mds", {"image": "bytes"}, images)


def write_mds(path: Path, columns: dict[str, str], samples: Iterable[dict[str, Any]]) -> Path:
    """Write a data set in mosaicml's format."""
    from streaming import MDSWriter

    with MDSWriter(out=str(path), columns=columns) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def read_images(folder: Path, num_bytes: int) -> Iterator[bytes]:
    """Give the payload, image by image."""
    with (folder / "images.bin").open("rb") as file:
        while image := file.read(num_bytes):
            yield image


class Column:
    """One column of a data set whose samples are dictionaries."""

    def __init__(self, dataset: Any, name: str) -> None:
        self._dataset, self._name = dataset, name

    def __iter__(self) -> Iterator[Any]:
        for sample in self._dataset:
            yield sample[self._name]


def open_litdata(kind: str, folder: Path, size: int, batch: int) -> dict[str, Reader]:
    """Give litdata's reader."""
    if kind == "tokens":
        rows = litdata_tokens(folder, size)
        return {"litdata, shuffled": Reader(batches(rows, batch, True), touch_tokens)}
    images = litdata_images(folder, size)
    return {"litdata, shuffled": Reader(batches(images, batch, False), touch_images)}


def open_mosaic(kind: str, folder: Path, size: int, batch: int) -> dict[str, Reader]:
    """Give mosaicml-streaming's readers."""
    stand_in_for_torchvision()
    from streaming import StreamingDataset

    is_text = kind == "tokens"
    written = mosaic_tokens(folder, size) if is_text else mosaic_images(folder, size)
    readers = {}
    for algorithm in ("py1e", "py1s"):
        # Two data sets of one process may not share a folder.
        path = written.with_name(f"{written.name}-{algorithm}")
        shutil.copytree(written, path, copy_function=os.link)
        dataset = StreamingDataset(
            local=str(path), shuffle=True, shuffle_algo=algorithm, batch_size=batch
        )
        column = Column(dataset, "tokens" if is_text else "image")
        touch = touch_tokens if is_text else touch_images
        readers[f"mosaicml {algorithm}"] = Reader(batches(column, batch, is_text), touch)
    return readers


def stand_in_for_torchvision() -> None:
    """Let mosaicml-streaming be imported, whose image classes are not used here."""
    import transformers.feature_extraction_utils
    import transformers.tokenization_utils_base  # noqa: F401  these would look closer

    for name in ("datasets", "transforms", "transforms.functional"):
        for full in ("torchvision", f"torchvision.{name}"):
            module = types.ModuleType(full)
            module.__spec__ = ModuleSpec(full, None)
            for attribute in ("VisionDataset", "CIFAR10", "to_tensor"):
                setattr(module, attribute, object)
            sys.modules.setdefault(full, module)


LIBRARIES = {"litdata": open_litdata, "mosaicml": open_mosaic}


def main() -> None:
    """Make the readers, then answer until the input ends."""
    library, kind, size, batch, folder = sys.argv[1:]
    # Libraries print; the pipe is for answers alone.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    readers: dict[str, Reader] = {}
    missing = None
    try:
        readers = LIBRARIES[library](kind, Path(folder), int(size), int(batch))
    except ImportError as err:
        missing = str(err)
    print(json.dumps({"readers": list(readers), "missing": missing}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        turn = readers[request["reader"]].turn(request["batches"])
        print(json.dumps(turn.as_dict()), file=answers, flush=True)


if __name__ == "__main__":
    main()
