"""The parallel half of preparing text: units of pieces to shards, one unit a process."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from datamodules.index import Shard, ShardFacts, digest_file, write_atomically
from datamodules.processes import run_tasks
from datamodules.selection import Document, Unit
from datamodules.tokenization import encode_parts, load_tokenizer
from datamodules.write import ShardWriter

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class UnitTask(Generic[Document]):
    """A unit of work: some text, and how it becomes at most one shard per split.

    Attributes:
        unit: the text; from its number the shards have their names.
        folder: of the prepared corpus.
        tokenizer: path of the tokenizer.
        end_token: number of the token after each document, None for none.
        fractions: share of each split.
        seed: key of the assignment to splits.
        chunk_tokens: tokens of a stored sample, about.
        dtype: of the stored tokens.
    """

    unit: Unit[Document]
    folder: Path
    tokenizer: Path
    end_token: int | None
    fractions: dict[str, float]
    seed: int
    chunk_tokens: int
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Size of the source text."""
        return self.unit.num_bytes

    @property
    def facts(self) -> Path:
        """File that says that the unit is finished and what its shards hold."""
        return self.unit.path("json")


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
class SplitText:
    """Tokens of one split while a unit is read.

    Attributes:
        parts: tokens, in order.
        ends: place of each end token.
        num_tokens: sum over the parts.
        num_bytes: of the text that they stand for.
    """

    parts: list[NDArray] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    num_tokens: int = 0
    num_bytes: int = 0

    def append(
        self, document: str, tokenizer: Tokenizer, end_token: int | None, dtype: str
    ) -> None:
        """Encode a document, and put its tokens and the end token behind what is there."""
        for tokens in encode_parts(tokenizer, document):
            self._append_tokens(tokens, dtype)
        if end_token is not None:
            self._append_tokens([end_token], dtype)
            self.ends.append(self.num_tokens - 1)
        self.num_bytes += len(document.encode())

    def _append_tokens(self, tokens: list[int], dtype: str) -> None:
        self.parts.append(np.array(tokens, dtype))
        self.num_tokens += len(tokens)


def token_dtype(vocab_size: int) -> np.dtype:
    """Choose the smallest stored type, of uint16 and uint32, that holds every token."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def split_of(document: str | bytes, fractions: Mapping[str, float], seed: int) -> str:
    """Assign a document to a split by a keyed hash of its content.

    Args:
        document: the text, or the bytes of another kind of sample.
        fractions: at least the shares of `val` and `test`.
        seed: the key.
    """
    key = seed.to_bytes(8, "little")
    content = document.encode() if isinstance(document, str) else document
    digest = hashlib.blake2b(content, digest_size=8, key=key).digest()
    place = int.from_bytes(digest, "little") / 2**64
    for split in ("val", "test"):
        if place < fractions[split]:
            return split
        place -= fractions[split]
    return "train"


def encode_units(tasks: list[UnitTask[str]], num_processes: int | None, title: str) -> None:
    """Encode the units that are not finished yet, in parallel, under a progress bar.

    The result does not depend on the number of processes, nor on how often it was interrupted.
    """
    run_tasks(encode_unit, tasks, num_processes, title, done=is_finished)


def encode_unit(task: UnitTask[str]) -> None:
    """Read, encode and write one unit, then its facts."""
    tokenizer = load_tokenizer(task.tokenizer)
    texts: dict[str, SplitText] = {}
    for piece, document in task.unit.documents():
        split = piece.split or split_of(document, task.fractions, task.seed)
        text = texts.setdefault(split, SplitText())
        text.append(document, tokenizer, task.end_token, task.dtype)
    write_facts(task, {split: write_shard(split, text, task) for split, text in texts.items()})


def merge_units(tasks: Sequence[UnitTask[Any]]) -> dict[str, MergedSplit]:
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
            "shards": [load_facts(facts["facts"]) for facts in shards],
        }
        text = {name: sum(facts["text"][name] for facts in shards) for name in shards[0]["text"]}
        merged[split] = MergedSplit(index, text)
    return merged


def is_finished(task: UnitTask[Any]) -> bool:
    """Tell whether an earlier preparation left this unit complete, by the bytes of its shards."""
    if not task.facts.exists():
        return False
    return all(
        has_shard(task.folder / split, part["facts"])
        for split, part in json.loads(task.facts.read_bytes()).items()
    )


def has_shard(folder: Path, facts: Mapping[str, Any]) -> bool:
    """Tell whether a folder holds the shard that facts, `ShardFacts` as JSON, were noted of."""
    path = folder / facts["shard"]["url"]
    return path.exists() and digest_file(path) == facts["shard"]["digest"]


def load_facts(facts: Mapping[str, Any]) -> ShardFacts:
    """Give facts of a shard as they were before they became JSON."""
    return ShardFacts(**{**facts, "shard": Shard(**facts["shard"])})


def write_facts(task: UnitTask[Any], facts: dict[str, Any]) -> None:
    """Write what the shards of a unit hold; that it is there says that they are complete."""
    task.facts.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(task.facts, json.dumps(facts).encode())


def write_shard(split: str, text: SplitText, task: UnitTask[Any]) -> dict[str, Any]:
    """Write the shard of one split of a unit.

    Returns:
        `facts`, those of the shard for the index, and `text`, counts that are summed over units.
    """
    folder = task.folder / split
    folder.mkdir(exist_ok=True)
    tokens, ends = np.concatenate(text.parts), np.array(text.ends, np.int64)
    # Chunks of equal length, so that no short remainder wastes its last, incomplete row.
    num_chunks = max(1, round(len(tokens) / task.chunk_tokens))
    cuts = [number * len(tokens) // num_chunks for number in range(num_chunks + 1)]
    with ShardWriter(folder / f"{split}-{task.unit.number:06d}.tar") as writer:
        for start, stop in pairwise(cuts):
            inside = ends[(ends >= start) & (ends < stop)] - start
            members = {"tokens.npy": tokens[start:stop], "ends.npy": inside.astype("<u4")}
            writer.write(stop - start, members)
        counts = {"documents": len(text.ends), "bytes": text.num_bytes, "tokens": len(tokens)}
        bounds = [0, *(ends + 1).tolist(), len(tokens)]
        documents = [stop - start for start, stop in pairwise(bounds) if stop > start]
        return {"facts": asdict(writer.finish(documents)), "text": counts}
