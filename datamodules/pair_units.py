"""The parallel half of preparing pairs: units to shards of source, target, source, target, ..."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.index import digest_bytes, digest_file, write_atomically
from datamodules.pair_cleaning import Pair
from datamodules.preparation import count_splits
from datamodules.processes import run_tasks
from datamodules.tokenization import load_tokenizer
from datamodules.units import (
    SPLITS,
    MergedSplit,
    SplitText,
    UnitTask,
    is_finished,
    split_of,
    write_facts,
    write_shard,
)

_TEXTS_SPLITS = ("val", "test")


@dataclass(frozen=True)
class PairTask(UnitTask[Pair]):
    """A unit of pairs; `tokenizer` and `end_token` are those of the sources.

    Attributes:
        target_tokenizer: path of the tokenizer of the targets.
        target_end_token: number of the token after each target.
    """

    target_tokenizer: Path
    target_end_token: int

    def texts(self, split: str) -> Path:
        """Name the file of the unit's texts of an evaluation split."""
        return self.unit.path(f"{split}.jsonl")


@dataclass
class _SplitPairs:
    """Tokens of the pairs of one split while a unit is read, and what is kept beside them."""

    text: SplitText = field(default_factory=SplitText)
    lines: list[str] = field(default_factory=list)
    target_bytes: int = 0


def encode_pairs(tasks: list[PairTask], num_processes: int | None, title: str) -> None:
    """Encode the units of pairs that are not finished yet; as `datamodules.units.encode_units`."""
    run_tasks(encode_unit, tasks, num_processes, title, done=_is_finished)


def encode_unit(task: PairTask) -> None:
    """Read, encode and write one unit, then its facts."""
    tokenizer = load_tokenizer(task.tokenizer)
    target_tokenizer = load_tokenizer(task.target_tokenizer)
    splits: dict[str, _SplitPairs] = {}
    for piece, pair in task.unit.documents():
        # By the source alone, so that equal ones never face each other across a split.
        split = piece.split or split_of(pair.source, task.fractions, task.seed)
        pairs = splits.setdefault(split, _SplitPairs())
        pairs.text.append(pair.source, tokenizer, task.end_token, task.dtype)
        pairs.target_bytes -= pairs.text.num_bytes
        pairs.text.append(pair.target, target_tokenizer, task.target_end_token, task.dtype)
        pairs.target_bytes += pairs.text.num_bytes
        if split in _TEXTS_SPLITS:
            pairs.lines.append(json.dumps(pair) + "\n")
    facts = {}
    for split, pairs in splits.items():
        facts[split] = write_shard(split, pairs.text, task)
        facts[split]["text"]["target_bytes"] = pairs.target_bytes
        if split in _TEXTS_SPLITS:
            content = "".join(pairs.lines).encode()
            write_atomically(task.texts(split), content)
            facts[split]["texts"] = digest_bytes(content)
    write_facts(task, facts)


def merge_texts(tasks: Sequence[PairTask], split: str, path: Path) -> str:
    """Put the texts of all units behind each other, and give the digest of the file."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as merged:
        for task in tasks:
            if task.texts(split).exists():
                with task.texts(split).open("rb") as part:
                    shutil.copyfileobj(part, merged)
    digest = digest_file(temporary)
    temporary.replace(path)
    return digest


def count_pairs(merged: Mapping[str, MergedSplit]) -> dict[str, Any]:
    """Collect the facts by split; None where there is no such split, so that keys stay."""
    counts: dict[str, dict[str, int | None]] = {
        name: dict.fromkeys(SPLITS)
        for name in ("pairs", "source_tokens", "target_tokens", "longest_source", "longest_target")
    }
    for split, part in merged.items():
        lengths = np.concatenate([shard.documents for shard in part.index["shards"]])
        counts["pairs"][split] = len(lengths) // 2
        for side, name in enumerate(("source", "target")):
            counts[f"{name}_tokens"][split] = int(lengths[side::2].sum())
            counts[f"longest_{name}"][split] = int(lengths[side::2].max())
    target_bytes = count_splits(merged, "target_bytes")
    return {
        **counts,
        **{name: count_splits(merged, name) for name in ("documents", "tokens", "bytes")},
        "bytes_per_token": {
            split: tokens and (target_bytes[split] or 0) / tokens
            for split, tokens in counts["target_tokens"].items()
        },
        "shards": {split: len(part.index["shards"]) for split, part in merged.items()},
    }


def _is_finished(task: PairTask) -> bool:
    """Tell whether a unit is complete, by the bytes of its shards and of its texts."""
    return is_finished(task) and all(
        task.texts(split).exists() and digest_file(task.texts(split)) == part["texts"]
        for split, part in json.loads(task.facts.read_bytes()).items()
        if "texts" in part
    )
