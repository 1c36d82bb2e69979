"""A corpus: from a text file, a folder, JSONL or Parquet to tokenized tar shards, once.

What is prepared is named by a hash of the settings and of the content of the sources, so the same
corpus is never prepared twice and a changed one never taken for the old. An interrupted preparation
leaves finished units of work behind, and the next one goes on from them.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.cleaning import Cleaning, parse_cleaning
from datamodules.facts import FACTS_FILE, TOKENIZER_FILE, PreparedData
from datamodules.index import digest_bytes, write_atomically, write_index
from datamodules.lines import suffix_of
from datamodules.processes import exclusive
from datamodules.selection import Unit, select_documents
from datamodules.sources import (
    RECORDS,
    SourceFile,
    digest_sources,
    list_files,
    plan_units,
)
from datamodules.tokenization import BPE, BYTE, CHAR, build_tokenizer, load_tokenizer
from datamodules.units import (
    SPLITS,
    MergedSplit,
    UnitTask,
    encode_units,
    merge_units,
    split_of,
    token_dtype,
)

FORMAT_VERSION = 2
UNITS_FOLDER = "units"
_DIGEST_CACHE = ".source_digests.json"

BPE_TRAINING_BYTES = 256 * 2**20
"""Text that a vocabulary is trained on at most, spread evenly over the corpus: more changes few
merges, and the trainer holds its words in memory."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text and how to prepare it; making one does not touch the disk.

    A single text file is cut contiguously into train, val and test. Of anything else each document
    goes where a keyed hash of its content sends it, so equal documents never face each other across
    a split.

    Args:
        name: of the corpus, the first part of the name of its folder.
        path: text file, folder, `.jsonl` (also `.gz`, `.zst`), `.parquet`, or `builtin:stdlib`, the
            source of the Python standard library of this interpreter without its tests.
        suffixes: endings of the files that count in a folder.
        text_key: field of a JSONL or Parquet record that holds the text.
        tokenizer: `byte`, `char`, `bpe`, or the path of a `tokenizer.json`.
        vocab_size: tokens of a `bpe` vocabulary.
        end_token: token after each document; unused where there is one document only.
        val_fraction: share of the documents, or of the one document.
        test_fraction: the same for the test split; 0 makes none.
        chunk_kb: size of a stored sample of tokens, in KiB.
        shard_mb: source text of a shard, in MiB.
        num_processes: processes that encode; None takes a process per core.
        seed: key of the assignment to splits.
        clean: steps of `datamodules.cleaning.Cleaning`. The one setting with a default: the
            configurations of earlier runs lack it.
    """

    name: str
    path: str
    suffixes: list[str]
    text_key: str
    tokenizer: str
    vocab_size: int | None
    end_token: str
    val_fraction: float
    test_fraction: float
    chunk_kb: int
    shard_mb: float
    num_processes: int | None
    seed: int
    clean: Mapping[str, Any] | None = None

    def prepare(self, data_dir: str | Path) -> PreparedData:
        """Prepare the corpus below `data_dir`, or find it there.

        Several processes may ask at once: one works, the others wait and take its result.

        Returns:
            Where the data is and what it is.

        Raises:
            ValueError: the corpus is missing, empty, unreadable or too small for its splits, or a
                setting is impossible; the message names the key.
        """
        self._check_sizes()
        self._check_fractions()
        self._check_cleaning()
        data_dir = Path(data_dir)
        files = list_files(str(self.path), list(self.suffixes))
        digest = self._digest(digest_sources(files, data_dir / _DIGEST_CACHE))
        path = data_dir / f"{self.name}-{digest}"
        if not (path / FACTS_FILE).exists():
            with exclusive(data_dir / f".{path.name}.lock"):
                if not (path / FACTS_FILE).exists():
                    self._build(files, path, digest)
        facts = json.loads((path / FACTS_FILE).read_bytes())
        return PreparedData(path, {"path": str(path), **facts})

    def _check_sizes(self) -> None:
        # A part of no byte would never end.
        least = {"chunk_kb": 1, "shard_mb": 2**-20, "seed": 0}
        for key, smallest in least.items():
            if (value := getattr(self, key)) < smallest:
                raise ValueError(
                    f"corpus.{key}={value} -> it is a number -> use {smallest} or more"
                )

    def _check_fractions(self) -> None:
        if min(self.val_fraction, self.test_fraction) < 0 or not (
            self.val_fraction + self.test_fraction < 1
        ):
            raise ValueError(
                f"corpus.val_fraction={self.val_fraction}, corpus.test_fraction="
                f"{self.test_fraction} -> nothing is left to train on -> their sum must be below 1"
            )

    def _check_cleaning(self) -> None:
        if self._cleaning is not None and self._is_one_document:
            raise ValueError(
                f"corpus.clean={self._cleaning.settings} -> {self.path} is one document, which is "
                "cut as it is -> clean a folder or a file of records, or set corpus/clean=none"
            )

    @property
    def _cleaning(self) -> Cleaning | None:
        return parse_cleaning(self.clean)

    @property
    def _fractions(self) -> dict[str, float]:
        train_fraction = 1 - self.val_fraction - self.test_fraction
        return {"train": train_fraction, "val": self.val_fraction, "test": self.test_fraction}

    @property
    def _is_one_document(self) -> bool:
        return Path(self.path).is_file() and suffix_of(Path(self.path)) not in RECORDS

    def _settings(self) -> dict[str, Any]:
        """Collect what the bytes of the prepared data depend on, besides the sources."""
        own = self.tokenizer in (BYTE, CHAR, BPE)
        cleaning = self._cleaning
        return {
            "version": FORMAT_VERSION,
            "text_key": self.text_key,
            "tokenizer": self.tokenizer if own else _digest_tokenizer(self.tokenizer),
            "vocab_size": self.vocab_size if self.tokenizer == BPE else None,
            "end_token": None if self._is_one_document else self.end_token,
            "val_fraction": self.val_fraction,
            "test_fraction": self.test_fraction,
            "chunk_kb": self.chunk_kb,
            "shard_mb": self.shard_mb,
            "seed": self.seed,
            **({"clean": cleaning.settings} if cleaning else {}),
        }

    def _digest(self, sources: str) -> str:
        content = json.dumps([self._settings(), sources], sort_keys=True)
        return digest_bytes(content.encode())[:12]

    def _build(self, files: list[SourceFile], path: Path, digest: str) -> None:
        path.mkdir(parents=True, exist_ok=True)
        for leftover in path.rglob("*.tmp"):
            leftover.unlink()
        fractions = self._fractions if self._is_one_document else None
        plan = plan_units(files, int(self.shard_mb * 2**20), fractions)
        cleaning, folder = self._cleaning, path / UNITS_FOLDER
        units = [Unit(n, pieces, self.text_key, cleaning, folder) for n, pieces in enumerate(plan)]
        cleaned = {}
        if cleaning is not None:
            title = f"Cleaning {self.name}"
            cleaned = select_documents(units, cleaning, self.num_processes, title)
        if not (path / TOKENIZER_FILE).exists():
            self._build_tokenizer(units, path / TOKENIZER_FILE)
        tokenizer = load_tokenizer(path / TOKENIZER_FILE)
        # Numbers of an existing vocabulary may have gaps, so that counting them is not enough.
        vocab_size = max(tokenizer.get_vocab().values()) + 1
        end_token = None if self._is_one_document else tokenizer.token_to_id(self.end_token)
        tasks = self._tasks(units, path, end_token, token_dtype(vocab_size))
        encode_units(tasks, self.num_processes, f"Preparing {self.name}")
        merged = merge_units(tasks)
        self._check_splits(merged)
        for split, dataset in merged.items():
            write_index(path / split, tokenizer=f"../{TOKENIZER_FILE}", **dataset.index)
        facts = {"digest": digest, "vocab_size": vocab_size, "end_token": end_token}
        facts |= self._count(merged) | cleaned
        # Last, since its presence says that the rest is complete.
        write_atomically(path / FACTS_FILE, json.dumps(facts, indent=1).encode() + b"\n")
        shutil.rmtree(path / UNITS_FOLDER)

    def _tasks(
        self, units: list[Unit], path: Path, end_token: int | None, dtype: np.dtype
    ) -> list[UnitTask]:
        return [
            UnitTask(
                unit=unit,
                folder=path,
                tokenizer=path / TOKENIZER_FILE,
                end_token=end_token,
                fractions=self._fractions,
                seed=self.seed,
                chunk_tokens=self.chunk_kb * 1024 // dtype.itemsize,
                dtype=dtype.str,
            )
            for unit in units
        ]

    def _count(self, merged: dict[str, MergedSplit]) -> dict[str, Any]:
        """Collect the facts by split; None where there is no such split, so that keys stay."""
        texts = {split: merged[split].text if split in merged else None for split in SPLITS}
        if self._is_one_document:
            texts = {split: text and {**text, "documents": 1} for split, text in texts.items()}
        return {
            "bytes_per_token": {
                s: text and text["bytes"] / text["tokens"] for s, text in texts.items()
            },
            **{
                name: {split: text and text[name] for split, text in texts.items()}
                for name in ("documents", "tokens", "bytes")
            },
            "shards": {split: len(part.index["shards"]) for split, part in merged.items()},
            "settings": {"path": self.path, **self._settings()},
        }

    def _build_tokenizer(self, units: list[Unit], path: Path) -> None:
        total = sum(unit.num_bytes for unit in units)
        stride = -(-total // BPE_TRAINING_BYTES) if self.tokenizer == BPE else 1

        def documents() -> Iterator[str]:
            for unit in units[::stride]:
                for piece, document in unit.documents():
                    split = piece.split or split_of(document, self._fractions, self.seed)
                    # Every character of the corpus needs a number; merges are learned, and
                    # learning is for the training split.
                    if split == "train" or self.tokenizer == CHAR:
                        yield document

        tokenizer = build_tokenizer(
            self.tokenizer,
            vocab_size=self.vocab_size,
            end_token=None if self._is_one_document else self.end_token,
            documents=documents(),
        )
        write_atomically(path, tokenizer.to_str(pretty=True).encode())

    def _check_splits(self, merged: dict[str, MergedSplit]) -> None:
        for split, fraction in self._fractions.items():
            if fraction > 0 and split not in merged:
                raise ValueError(
                    f"corpus.val_fraction={self.val_fraction}, corpus.test_fraction="
                    f"{self.test_fraction} -> no text of {self.path} fell into {split} -> raise "
                    f"its share, change corpus.seed={self.seed}, or take a larger corpus"
                )


def _digest_tokenizer(path: str) -> str | None:
    # A path that does not exist is reported where the tokenizer is built.
    return digest_bytes(Path(path).read_bytes()) if Path(path).is_file() else None
