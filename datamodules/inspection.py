"""What a data set on disk holds, and whether it is what was written."""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from datamodules.index import INDEX_FILE, Index, digest_file, is_remote, read_index
from datamodules.processes import run_tasks
from datamodules.reader import ShardReader
from datamodules.tokenization import load_tokenizer
from datamodules.units import SPLITS

_SHOWN_CHARACTERS = 80
_SHOWN_TOKENS = 64
_TEXTS = ("json", "txt", "text", "cls", "caption")


@dataclass(frozen=True)
class FileTask:
    """A file to hash.

    Attributes:
        path: where it lies.
        digest: what its index says.
        num_bytes: its size.
    """

    path: Path
    digest: str
    num_bytes: int


def inspect_data(path: str, num_processes: int | None) -> None:
    """Hash the shards and tables of a data set, or of each split of a corpus, and print it.

    Args:
        path: folder with an index, or with `train`, `val` or `test` of which each has one.
        num_processes: None takes a process per core.

    Raises:
        ValueError: there is no index, or files are not those that it was written with; the message
            names them.
    """
    root = Path(path)
    folders = [root / split for split in SPLITS if (root / split / INDEX_FILE).exists()]
    indexes = [read_index(folder) for folder in folders or [root]]
    tasks = [task for index in indexes for task in _files(index)]
    digests = run_tasks(_hash, tasks, num_processes, f"Checking {root.name}")
    bad = [task.path for task, found in zip(tasks, digests.values(), strict=True) if not found]
    if bad:
        raise ValueError(
            f"inspect={path} -> {len(bad)} of {len(tasks)} files are not those that the index was "
            f"written with: {', '.join(map(str, bad))} -> restore them, or prepare the data again"
        )
    _print_counts(list(indexes))
    for index in indexes:
        _print_samples(index)


def print_data(path: Path) -> None:
    """Print what a data set holds, and where it lies."""
    _print_counts([read_index(path)])
    Console().print(f"path: {path}", soft_wrap=True, highlight=False)


def _print_counts(indexes: list[Index]) -> None:
    columns = ("data set", "shards", "samples", "bytes", "length of a sample", "documents")
    table = Table(*columns)
    for index in indexes:
        lengths = index.lengths
        unit = "tokens" if index.tokenizer else "bytes"
        marks = (lengths.min(), int(np.median(lengths)), lengths.max()) if len(lengths) else ()
        table.add_row(
            index.path.resolve().name,
            f"{len(index.shards):,}",
            f"{len(lengths):,}",
            f"{sum(shard.num_bytes for shard in index.shards):,}",
            " / ".join(f"{mark:,}" for mark in marks) + f" {unit}",
            f"{len(index.documents):,}" if index.tokenizer else "",
        )
    console = Console()
    console.print(table)
    console.print("length: least / median / largest", highlight=False)
    for index in indexes:
        members = [f"{e} (optional)" if "optional" in c else e for e, c in index.schema.items()]
        text = f"{index.path.resolve().name}: {', '.join(members)}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _print_samples(index: Index) -> None:
    """Print the first sample of a data set, the middle one and the last."""
    num_samples = len(index.lengths)
    tokenizer = None
    if index.tokenizer is not None:
        tokenizer = load_tokenizer(index.path / index.tokenizer)
    reader, console = ShardReader(index), Console()
    for number in sorted({0, num_samples // 2, num_samples - 1} if num_samples else ()):
        lines = [f"{index.path.resolve().name}, sample {number}: {reader.sample(number)[0].key}"]
        lines += _describe(reader, number, tokenizer)
        console.print("\n  ".join(lines), markup=False, highlight=False, soft_wrap=True)


def _files(index: Index) -> list[FileTask]:
    shards = [
        FileTask(Path(shard.url), shard.digest, shard.num_bytes)
        for shard in index.shards
        if not is_remote(shard.url)
    ]
    tables = json.loads((index.path / INDEX_FILE).read_bytes())["tables"]
    return shards + [
        FileTask(path := index.path / name, digest, path.stat().st_size)
        for name, digest in tables.items()
    ]


def _hash(task: FileTask) -> bool:
    return digest_file(task.path) == task.digest


def _describe(reader: ShardReader, number: int, tokenizer: Tokenizer | None) -> list[str]:
    """Name, size and something of the content of each member of a sample."""
    sample, region = reader.sample(number)
    lines = []
    for extension, (offset, size) in sample.members.items():
        content = bytes(reader.region(region)[offset : offset + size])
        codec, shown = extension.rpartition(".")[2], ""
        if codec in _TEXTS:
            shown = repr(content.decode(errors="replace"))
        elif codec == "npy":
            array = np.load(io.BytesIO(content), allow_pickle=False)
            shown = f"{array.dtype}{list(array.shape)}"
            if extension == "tokens.npy" and tokenizer is not None:
                shown = repr(tokenizer.decode(array[:_SHOWN_TOKENS].tolist()))
        is_long = len(shown) > _SHOWN_CHARACTERS
        shown = shown[:_SHOWN_CHARACTERS] + "..." * is_long
        lines.append(f"{extension}, {size:,} bytes{': ' * bool(shown)}{shown}")
    return lines
