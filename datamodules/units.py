"""The parallel half of preparing text: units of pieces to shards, one unit a process."""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from datamodules.index import Shard, ShardFacts, digest_file, write_atomically
from datamodules.sources import Piece, read_documents
from datamodules.tokenization import encode_parts, load_tokenizer
from datamodules.write import ShardWriter

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class UnitTask:
    """A unit of work: some pieces of text, and how they become at most one shard per split.

    Attributes:
        number: place of the unit, from which its shards have their names.
        pieces: the text.
        folder: of the prepared corpus.
        tokenizer: path of the tokenizer.
        end_token: number of the token after each document, None for none.
        text_key: field of a record that holds the text.
        fractions: share of each split.
        seed: key of the assignment to splits.
        chunk_tokens: tokens of a stored sample, about.
        dtype: of the stored tokens.
        facts: file that says that the unit is finished and what its shards hold.
    """

    number: int
    pieces: list[Piece]
    folder: Path
    tokenizer: Path
    end_token: int | None
    text_key: str
    fractions: dict[str, float]
    seed: int
    chunk_tokens: int
    dtype: str
    facts: Path

    @property
    def num_bytes(self) -> int:
        """Size of the source text."""
        return sum(piece.num_bytes for piece in self.pieces)


@dataclass
class MergedSplit:
    """The shards of one split over all units.

    Attributes:
        index: arguments of `datamodules.index.write_index`.
        text: documents, bytes of text and tokens that went in.
    """

    index: dict[str, Any]
    text: dict[str, int]


@dataclass
class _SplitText:
    """Tokens of one split while a unit is read."""

    parts: list[NDArray] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    num_tokens: int = 0
    num_bytes: int = 0

    def append(self, tokens: list[int], dtype: str) -> None:
        self.parts.append(np.array(tokens, dtype))
        self.num_tokens += len(tokens)


def token_dtype(vocab_size: int) -> np.dtype:
    """Choose the smallest stored type, of uint16 and uint32, that holds every token."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def split_of(document: str, fractions: dict[str, float], seed: int) -> str:
    """Assign a document to a split by a keyed hash of its content.

    Args:
        document: the text.
        fractions: at least the shares of `val` and `test`.
        seed: the key.
    """
    key = seed.to_bytes(8, "little")
    digest = hashlib.blake2b(document.encode(), digest_size=8, key=key).digest()
    place = int.from_bytes(digest, "little") / 2**64
    for split in ("val", "test"):
        if place < fractions[split]:
            return split
        place -= fractions[split]
    return "train"


def encode_units(tasks: list[UnitTask], num_processes: int | None, title: str) -> None:
    """Encode the units that are not finished yet, in parallel, under a progress bar.

    The result does not depend on the number of processes, nor on how often it was interrupted.
    """
    todo = [task for task in tasks if not _is_finished(task)]
    num_processes = min(num_processes or _count_cores(), len(todo))
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, TimeRemainingColumn()) as progress:
        bar = progress.add_task(title, total=sum(task.num_bytes for task in tasks))
        progress.advance(bar, sum(t.num_bytes for t in tasks) - sum(t.num_bytes for t in todo))
        if num_processes <= 1:
            for task in todo:
                encode_unit(task)
                progress.advance(bar, task.num_bytes)
            return
        for task in _encode_in_processes(todo, num_processes):
            progress.advance(bar, task.num_bytes)


def encode_unit(task: UnitTask) -> None:
    """Read, encode and write one unit, then its facts."""
    tokenizer = load_tokenizer(task.tokenizer)
    texts: dict[str, _SplitText] = {}
    for piece in task.pieces:
        for document in read_documents(piece, task.text_key):
            split = piece.split or split_of(document, task.fractions, task.seed)
            _append_document(texts.setdefault(split, _SplitText()), document, tokenizer, task)
    facts = {split: _write_shard(split, text, task) for split, text in texts.items()}
    task.facts.parent.mkdir(exist_ok=True)
    write_atomically(task.facts, json.dumps(facts).encode())


def merge_units(tasks: list[UnitTask]) -> dict[str, MergedSplit]:
    """Put the shards of all units together, in the order of the units; splits without text lack."""
    units = [json.loads(task.facts.read_bytes()) for task in tasks]
    merged = {}
    for split in SPLITS:
        shards = [unit[split] for unit in units if split in unit]
        if not shards:
            continue
        index = {
            "schema": {
                "tokens.npy": {"codec": "npy", "dtype": np.dtype(tasks[0].dtype).name},
                "ends.npy": {"codec": "npy", "dtype": "uint32"},
            },
            "shards": [
                ShardFacts(**{**facts["facts"], "shard": Shard(**facts["facts"]["shard"])})
                for facts in shards
            ],
        }
        text = {name: sum(facts["text"][name] for facts in shards) for name in shards[0]["text"]}
        merged[split] = MergedSplit(index, text)
    return merged


def _is_finished(task: UnitTask) -> bool:
    """Tell whether an earlier preparation left this unit complete, by the bytes of its shards."""
    if not task.facts.exists():
        return False
    for split, part in json.loads(task.facts.read_bytes()).items():
        shard = part["facts"]["shard"]
        path = task.folder / split / shard["url"]
        if not path.exists() or digest_file(path) != shard["digest"]:
            return False
    return True


def _count_cores() -> int:
    # Where the system can restrict a process to some cores, count those.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _append_document(text: _SplitText, document: str, tokenizer: Tokenizer, task: UnitTask) -> None:
    for tokens in encode_parts(tokenizer, document):
        text.append(tokens, task.dtype)
    if task.end_token is not None:
        text.append([task.end_token], task.dtype)
        text.ends.append(text.num_tokens - 1)
    text.num_bytes += len(document.encode())


def _write_shard(split: str, text: _SplitText, task: UnitTask) -> dict[str, Any]:
    folder = task.folder / split
    folder.mkdir(exist_ok=True)
    tokens, ends = np.concatenate(text.parts), np.array(text.ends, np.int64)
    # Chunks of equal length, so that no short remainder wastes its last, incomplete row.
    num_chunks = max(1, round(len(tokens) / task.chunk_tokens))
    cuts = [number * len(tokens) // num_chunks for number in range(num_chunks + 1)]
    with ShardWriter(folder / f"{split}-{task.number:06d}.tar") as writer:
        for start, stop in pairwise(cuts):
            inside = ends[(ends >= start) & (ends < stop)] - start
            members = {"tokens.npy": tokens[start:stop], "ends.npy": inside.astype("<u4")}
            writer.write(stop - start, members)
        counts = {"documents": len(text.ends), "bytes": text.num_bytes, "tokens": len(tokens)}
        bounds = [0, *(ends + 1).tolist(), len(tokens)]
        documents = [stop - start for start, stop in pairwise(bounds) if stop > start]
        return {"facts": asdict(writer.finish(documents)), "text": counts}


def _encode_in_processes(tasks: list[UnitTask], num_processes: int) -> Iterator[UnitTask]:
    """Yield tasks as they are finished."""
    # Spawned, not forked: the tokenizers library has threads by now, and so may the caller.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, context, _start_process) as pool:
        futures: dict[Future[None], UnitTask] = {pool.submit(encode_unit, t): t for t in tasks}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        finally:
            pool.shutdown(cancel_futures=True)


def _start_process() -> None:
    """Make a worker process single-threaded, and end it with its parent."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, without a traceback

    def follow_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
