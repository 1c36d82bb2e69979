"""What a data set on disk holds, and whether it is what was written."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from datamodules.facts import FACTS_FILE, PAIRS, TARGET_TOKENIZER_FILE, TEXTS_FILE
from datamodules.foreign import open_archive
from datamodules.image_files import SUFFIXES, describe
from datamodules.index import INDEX_FILE, Index, Shard, digest_file, is_remote, read_index
from datamodules.processes import run_tasks
from datamodules.tar import StoredSample, read_samples
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
    """Hash the files of a data set, or of each split of a corpus, and print what is in them.

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
        if (facts := _read_facts(index)).get("kind") == PAIRS:
            _print_pairs(index, facts["is_joint"])
        else:
            _print_samples(index, facts.get("classes") or [])


def print_data(path: Path) -> None:
    """Print what a data set holds, and where it lies."""
    _print_counts([read_index(path)])
    Console().print(f"path: {path}", soft_wrap=True, highlight=False)


def _print_counts(indexes: list[Index]) -> None:
    table = Table("data set", "shards", "samples", "documents", "bytes")
    lines = []
    for index in indexes:
        name, lengths = index.path.resolve().name, index.lengths
        unit = "tokens" if index.tokenizer else "bytes"
        table.add_row(
            name,
            f"{len(index.shards):,}",
            f"{len(lengths):,}",
            f"{len(index.documents):,}" if index.tokenizer else "",
            f"{sum(shard.num_bytes for shard in index.shards):,}",
        )
        if len(lengths):
            ends, middle = f"{lengths.min():,} to {lengths.max():,}", int(np.median(lengths))
            lines.append(f"{name}: {ends} {unit} a sample, median {middle:,}")
        members = [f"{e} (optional)" if "optional" in c else e for e, c in index.schema.items()]
        lines.append(f"{name}: {', '.join(members)}")
    console = Console()
    console.print(table)
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _print_samples(index: Index, classes: list[str]) -> None:
    """Print the first sample of a data set, the middle one and the last, where they are local."""
    num_samples = len(index.lengths)
    tokenizer = None
    if index.tokenizer is not None:
        tokenizer = load_tokenizer(index.path / index.tokenizer)
    stops = np.cumsum([shard.num_samples for shard in index.shards])
    for number in sorted({0, num_samples // 2, num_samples - 1} if num_samples else ()):
        place = int(np.searchsorted(stops, number, side="right"))
        shard = index.shards[place]
        if is_remote(shard.url):
            continue
        with open_archive(Path(shard.url)) as archive:
            samples, _ = read_samples(archive, 0, len(archive))
            sample = samples[number - int(stops[place]) + shard.num_samples]
            lines = [f"{index.path.resolve().name}, sample {number}: {sample.key}"]
            lines += _describe(archive, sample, tokenizer, classes)
        Console().print("\n  ".join(lines), markup=False, highlight=False, soft_wrap=True)


def _print_pairs(index: Index, is_joint: bool) -> None:
    """Print the first pair of a split, the middle one and the last, where they are local."""
    assert index.tokenizer is not None
    path = index.path / index.tokenizer
    tokenizers = [path, path if is_joint else path.with_name(TARGET_TOKENIZER_FILE)]
    source, target = map(load_tokenizer, tokenizers)
    num_pairs = len(index.documents) // 2
    stops = np.cumsum([shard.num_documents for shard in index.shards])
    for number in sorted({0, num_pairs // 2, num_pairs - 1}):
        shard = index.shards[place := int(np.searchsorted(stops, 2 * number, side="right"))]
        if is_remote(shard.url):
            continue
        before = index.documents[int(stops[place]) - shard.num_documents : 2 * number]
        start, lengths = int(before.sum()), index.documents[2 * number : 2 * number + 2]
        tokens = _read_tokens(shard)[start : start + int(lengths.sum())]
        lines = [f"{index.path.resolve().name}, pair {number}"]
        sides = zip(np.split(tokens, [int(lengths[0])]), (source, target), strict=True)
        for name, (part, tokenizer) in zip(("source", "target"), sides, strict=True):
            text = _shorten(repr(tokenizer.decode(part.tolist())))
            lines.append(f"{name}, {len(part):,} tokens: {text}")
        Console().print("\n  ".join(lines), markup=False, highlight=False, soft_wrap=True)


def _read_tokens(shard: Shard) -> NDArray[np.integer]:
    """Read all tokens of a shard of text, in order."""
    with open_archive(Path(shard.url)) as archive:
        samples, _ = read_samples(archive, 0, len(archive))
        places = [sample.members["tokens.npy"] for sample in samples]
        files = [io.BytesIO(archive[offset : offset + size]) for offset, size in places]
    return np.concatenate([np.load(file, allow_pickle=False) for file in files])


def _read_facts(index: Index) -> dict[str, Any]:
    """Facts of the corpus that a data set is a split of, if it is one."""
    path = index.path.resolve().parent / FACTS_FILE
    return json.loads(path.read_bytes()) if path.exists() else {}


def _files(index: Index) -> list[FileTask]:
    shards = [
        FileTask(Path(shard.url), shard.digest, shard.num_bytes)
        for shard in index.shards
        if not is_remote(shard.url)
    ]
    tables = json.loads((index.path / INDEX_FILE).read_bytes())["tables"]
    if texts := _read_facts(index).get("texts", {}).get(index.path.resolve().name):
        tables[TEXTS_FILE] = texts
    return shards + [
        FileTask(path := index.path / name, digest, path.stat().st_size if path.exists() else 0)
        for name, digest in tables.items()
    ]


def _hash(task: FileTask) -> bool:
    return task.path.exists() and digest_file(task.path) == task.digest


def _describe(
    archive: memoryview, sample: StoredSample, tokenizer: Tokenizer | None, classes: list[str]
) -> list[str]:
    """Name, size and something of the content of each member of a sample."""
    lines = []
    for extension, (offset, size) in sample.members.items():
        content = bytes(archive[offset : offset + size])
        codec, shown = extension.rpartition(".")[2], ""
        if codec in _TEXTS:
            shown = repr(content.decode(errors="replace"))
            if extension == "cls" and classes:
                shown += f" ({classes[int(content)]})"
        elif f".{codec}" in SUFFIXES:
            shown = describe(content)
        elif codec == "npy":
            array = np.load(io.BytesIO(content), allow_pickle=False)
            shown = f"{array.dtype}{list(array.shape)}"
            if extension == "tokens.npy" and tokenizer is not None:
                shown = repr(tokenizer.decode(array[:_SHOWN_TOKENS].tolist()))
        lines.append(f"{extension}, {size:,} bytes{': ' * bool(shown)}{_shorten(shown)}")
    return lines


def _shorten(text: str) -> str:
    return text[:_SHOWN_CHARACTERS] + "..." * (len(text) > _SHOWN_CHARACTERS)
