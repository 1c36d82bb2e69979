"""A corpus: from a text file, a folder, JSONL or Parquet to tokenized tar shards, once.

What is prepared is named by a hash of the settings and of the content of the sources, so the same
corpus is never prepared twice and a changed one never taken for the old. An interrupted preparation
leaves finished units of work behind, and the next one goes on from them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.cleaning import Cleaning, parse_cleaning
from datamodules.facts import TOKENIZER_FILE, PreparedData
from datamodules.index import write_atomically, write_index
from datamodules.lines import suffix_of
from datamodules.preparation import (
    TRAINING_BYTES,
    UNITS_FOLDER,
    check_sizes,
    check_splits,
    count_splits,
    prepare_once,
    shares_of,
    vocab_size_of,
    vocabulary_settings,
)
from datamodules.records import RECORDS
from datamodules.selection import Unit, select_documents
from datamodules.sources import SourceFile, list_files, plan_units, read_documents
from datamodules.tokenization import (
    BPE,
    CHAR,
    build_tokenizer,
    find_sentinels,
    load_tokenizer,
)
from datamodules.units import (
    MergedSplit,
    UnitTask,
    encode_units,
    merge_units,
    split_of,
    token_dtype,
)

FORMAT_VERSION = 2


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
        tokenizer: `byte`, `char`, `bpe`, `word`, or the path of a `tokenizer.json`.
        vocab_size: tokens of a `bpe` or `word` vocabulary.
        end_token: token after each document; unused where there is one document only.
        val_fraction: share of the documents, or of the one document.
        test_fraction: the same for the test split; 0 makes none.
        chunk_kb: size of a stored sample of tokens, in KiB.
        shard_mb: source text of a shard, in MiB.
        num_processes: processes that encode; None takes a process per core.
        seed: key of the assignment to splits.
        clean: steps of `datamodules.cleaning.Cleaning`. The two settings from here on have
            defaults, since the configurations of earlier runs lack them.
        num_sentinels: tokens `<extra_id_0>`, ... at the end of the vocabulary, for the corruption
            of spans.
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
    num_sentinels: int = 0

    def prepare(self, data_dir: str | Path) -> PreparedData:
        """Prepare the corpus below `data_dir`, or find it there.

        Several processes may ask at once: one works, the others wait and take its result.

        Returns:
            Where the data is and what it is.

        Raises:
            ValueError: the corpus is missing, empty, unreadable or too small for its splits, or a
                setting is impossible; the message names the key.
        """
        check_sizes(self)
        self._check_cleaning()
        files = list_files(str(self.path), list(self.suffixes))
        build = partial(self._build, files)
        return prepare_once(self.name, data_dir, files, self._settings(), build)

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
        return shares_of(self.val_fraction, self.test_fraction)

    @property
    def _is_one_document(self) -> bool:
        return Path(self.path).is_file() and suffix_of(Path(self.path)) not in RECORDS

    def _settings(self) -> dict[str, Any]:
        """Collect what the bytes of the prepared data depend on, besides the sources."""
        cleaning = self._cleaning
        return {
            "version": FORMAT_VERSION,
            "text_key": self.text_key,
            **vocabulary_settings(self.tokenizer, self.vocab_size),
            "end_token": None if self._is_one_document else self.end_token,
            "val_fraction": self.val_fraction,
            "test_fraction": self.test_fraction,
            "chunk_kb": self.chunk_kb,
            "shard_mb": self.shard_mb,
            "seed": self.seed,
            # Left out where they are off: data of the time before these settings stays valid.
            **({"clean": cleaning.settings} if cleaning else {}),
            **({"num_sentinels": self.num_sentinels} if self.num_sentinels else {}),
        }

    def _build(self, files: list[SourceFile], path: Path) -> dict[str, Any]:
        fractions = self._fractions if self._is_one_document else None
        plan = plan_units(files, int(self.shard_mb * 2**20), fractions)
        cleaning, folder = self._cleaning, path / UNITS_FOLDER
        read = partial(read_documents, text_key=self.text_key)
        units = [Unit(n, pieces, read, cleaning, folder) for n, pieces in enumerate(plan)]
        cleaned = {}
        if cleaning is not None:
            title = f"Cleaning {self.name}"
            cleaned = select_documents(units, cleaning, self.num_processes, title)
        if not (path / TOKENIZER_FILE).exists():
            self._build_tokenizer(units, path / TOKENIZER_FILE)
        tokenizer = load_tokenizer(path / TOKENIZER_FILE)
        vocab_size = vocab_size_of(tokenizer)
        end_token = None if self._is_one_document else tokenizer.token_to_id(self.end_token)
        tasks = self._tasks(units, path, end_token, token_dtype(vocab_size))
        encode_units(tasks, self.num_processes, f"Preparing {self.name}")
        merged = merge_units(tasks)
        check_splits(self._fractions, merged, self.path, self.seed)
        for split, dataset in merged.items():
            write_index(path / split, tokenizer=f"../{TOKENIZER_FILE}", **dataset.index)
        vocabulary = {
            "vocab_size": vocab_size,
            "end_token": end_token,
            "sentinels": find_sentinels(tokenizer),
        }
        return vocabulary | self._count(merged) | cleaned

    def _tasks(
        self, units: list[Unit[str]], path: Path, end_token: int | None, dtype: np.dtype
    ) -> list[UnitTask[str]]:
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
        counts = {name: count_splits(merged, name) for name in ("documents", "tokens", "bytes")}
        if self._is_one_document:
            counts["documents"] = {s: n if n is None else 1 for s, n in counts["documents"].items()}
        return {
            "bytes_per_token": {
                split: tokens and (counts["bytes"][split] or 0) / tokens
                for split, tokens in counts["tokens"].items()
            },
            **counts,
            "shards": {split: len(part.index["shards"]) for split, part in merged.items()},
            "settings": {"path": self.path, **self._settings()},
        }

    def _build_tokenizer(self, units: list[Unit[str]], path: Path) -> None:
        total = sum(unit.num_bytes for unit in units)
        stride = -(-total // TRAINING_BYTES) if self.tokenizer == BPE else 1

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
            num_sentinels=self.num_sentinels,
        )
        write_atomically(path, tokenizer.to_str(pretty=True).encode())
