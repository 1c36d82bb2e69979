"""A corpus of pairs: from parallel texts or records to tokenized tar shards, once.

Pairs are documents two by two: a shard's text is source 0, target 0, source 1, ..., each
followed by its end token, in chunks as any text. Texts of evaluation pairs lie beside the shards.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datamodules.facts import (
    PAIRS,
    TARGET_TOKENIZER_FILE,
    TEXTS_FILE,
    TOKENIZER_FILE,
    PreparedData,
)
from datamodules.index import write_atomically, write_index
from datamodules.pair_cleaning import Pair, PairCleaning
from datamodules.pair_selection import select_pairs
from datamodules.pair_sources import list_pairs, plan_pairs, read_pairs
from datamodules.pair_units import PairTask, count_pairs, encode_pairs, merge_texts
from datamodules.preparation import (
    TRAINING_BYTES,
    UNITS_FOLDER,
    check_bounds,
    check_sizes,
    check_splits,
    fractions_of,
    prepare_once,
    vocab_size_of,
    vocabulary_settings,
)
from datamodules.selection import Unit
from datamodules.sources import SourceFile
from datamodules.tokenization import (
    BPE,
    CHAR,
    KINDS,
    build_tokenizer,
    find_sentinels,
    load_tokenizer,
)
from datamodules.units import merge_units, split_of, token_dtype

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class PairCorpus:
    """Pairs of texts and how to prepare them; making one does not touch the disk.

    A split is two text files, of which line i of one belongs to line i of the other, or a file of
    records. Pairs of `train` go to an evaluation split without files where a keyed hash of their
    source sends them. To splits with files of their own only `lowercase` and `empty` apply.

    Args:
        name: of the corpus, the first part of the name of its folder.
        train: `source` and `target`, paths of text files, or `path`, of `.jsonl` (also `.gz`,
            `.zst`) or `.parquet` records, or `builtin:stdlib_summaries`: functions of the Python
            standard library of this interpreter and the first lines of their docstrings.
        val: the same; no files, to take pairs of `train`.
        test: the same.
        source_key: field of a record that holds the source.
        target_key: field of a record that holds the target.
        tokenizer: `byte`, `char`, `bpe`, `word`, or the path of a `tokenizer.json`.
        target_tokenizer: path of that of targets, where `tokenizer` is that of sources; else None.
        joint_vocabulary: one for both sides; else each has its own, of one kind.
        vocab_size: tokens of a `bpe` or `word` vocabulary; None takes every word.
        min_frequency: times that a word, or a merged pair of tokens, occurs at least; None: any.
        lowercase: lower-case all text.
        num_sentinels: tokens `<extra_id_0>`, ... at the end of each vocabulary.
        end_token: token after each text.
        start_token: token that a decoder begins with; None takes the end token.
        empty: what becomes of a pair with a text without visible characters: `raise` or `drop`.
        max_characters: pairs with a longer text are removed; None sets no bound.
        max_length_ratio: so are pairs with more than so many times the characters on one side.
        unique: of equal pairs the first stays.
        val_fraction: share of the pairs of `train`; without effect where `val` has files.
        test_fraction: the same for the test split; 0 makes none.
        chunk_kb: size of a stored sample of tokens, in KiB.
        shard_mb: text of a shard, both sides, in MiB.
        num_processes: processes that encode; None takes a process per core.
        seed: key of the assignment to splits.
    """

    name: str
    train: Mapping[str, str | None]
    val: Mapping[str, str | None] | None
    test: Mapping[str, str | None] | None
    source_key: str
    target_key: str
    tokenizer: str
    target_tokenizer: str | None
    joint_vocabulary: bool
    vocab_size: int | None
    min_frequency: int | None
    lowercase: bool
    num_sentinels: int
    end_token: str
    start_token: str | None
    empty: str
    max_characters: int | None
    max_length_ratio: float | None
    unique: bool
    val_fraction: float
    test_fraction: float
    chunk_kb: int
    shard_mb: float
    num_processes: int | None
    seed: int

    def prepare(self, data_dir: str | Path) -> PreparedData:
        """Prepare the corpus below `data_dir`, or find it there.

        Several processes may ask at once: one works, the others wait and take its result.

        Returns:
            Where the data is and what it is.

        Raises:
            ValueError: the files are missing, unreadable, of unequal lengths or too small for the
                splits, a text is empty, or a setting is impossible; the message names the key.
        """
        self._check()
        listed = {split: list_pairs(split, paths) for split, paths in self._paths.items()}
        files = {split: found for split, found in listed.items() if found}
        every = [file for found in files.values() for file in found]
        settings = self._settings(files)
        build = partial(self._build, files, settings)
        return prepare_once(self.name, data_dir, every, settings, build)

    def _check(self) -> None:
        check_sizes(self)
        if self.empty not in ("raise", "drop"):
            raise ValueError(f"corpus.empty={self.empty} -> no such way -> choose raise or drop")
        check_bounds(self, max_characters=int, min_frequency=int, max_length_ratio=int | float)
        is_file, is_one = self.tokenizer not in KINDS, self.joint_vocabulary
        if (self.target_tokenizer is not None) != (is_file and not is_one):
            raise ValueError(
                f"corpus.tokenizer={self.tokenizer}, joint_vocabulary={is_one}, target_tokenizer="
                f"{self.target_tokenizer} -> two vocabularies of files take two of them -> give "
                "both with joint_vocabulary=false, or one file with true and target_tokenizer=null"
            )

    @property
    def _paths(self) -> dict[str, dict[str, str | None]]:
        given = {"train": self.train, "val": self.val, "test": self.test}
        return {split: dict(paths or {}) for split, paths in given.items()}

    def _settings(self, files: Mapping[str, list[SourceFile]]) -> dict[str, Any]:
        """Collect what the bytes of the prepared data depend on, besides the sources."""
        fractions = fractions_of(self, files)
        settings = {
            "version": FORMAT_VERSION,
            "kind": PAIRS,
            "splits": list(files),
            "val_fraction": fractions["val"],
            "test_fraction": fractions["test"],
            **vocabulary_settings(self.tokenizer, self.vocab_size),
        }
        others = (
            *("source_key", "target_key", "joint_vocabulary", "min_frequency", "lowercase"),
            *("num_sentinels", "end_token", "start_token", "empty", "max_characters"),
            *("max_length_ratio", "unique", "chunk_kb", "shard_mb", "seed"),
        )
        if self.target_tokenizer:
            settings["target_tokenizer"] = vocabulary_settings(self.target_tokenizer, None)
        return settings | {key: getattr(self, key) for key in others}

    def _build(
        self, files: Mapping[str, list[SourceFile]], settings: dict[str, Any], path: Path
    ) -> dict[str, Any]:
        fractions = fractions_of(self, files)
        units = {split: self._plan(split, files, path) for split in files}
        cleaned = select_pairs(
            units,
            drop_empty=self.empty == "drop",
            num_processes=self.num_processes,
            title=f"Cleaning {self.name}",
        )
        tokenizers = self._tokenizers(units, fractions, path)
        tasks = self._tasks(units, fractions, tokenizers, path)
        encode_pairs(tasks, self.num_processes, f"Preparing {self.name}")
        merged = merge_units(tasks)
        check_splits(fractions, merged, str(self._paths["train"]), self.seed)
        texts = {}
        for split, dataset in merged.items():
            write_index(path / split, tokenizer=f"../{TOKENIZER_FILE}", **dataset.index)
            if split != "train":
                texts[split] = merge_texts(tasks, split, path / split / TEXTS_FILE)
        source, target = (load_tokenizer(file) for file in tokenizers)
        start = self.end_token if self.start_token is None else self.start_token
        return {
            "kind": PAIRS,
            "vocab_size": vocab_size_of(source),
            "target_vocab_size": vocab_size_of(target),
            "is_joint": self.joint_vocabulary,
            "end_token": source.token_to_id(self.end_token),
            "target_end_token": target.token_to_id(self.end_token),
            "start_token": target.token_to_id(start),
            "sentinels": find_sentinels(source),
            **count_pairs(merged),
            "texts": {split: texts.get(split) for split in ("val", "test")},
            "settings": {**self._paths, **settings},
            **cleaned,
        }

    def _plan(
        self, split: str, files: Mapping[str, list[SourceFile]], path: Path
    ) -> list[Unit[Pair]]:
        is_train = split == "train"
        plan = plan_pairs(None if is_train else split, files[split], int(self.shard_mb * 2**20))
        cleaning = PairCleaning(
            lowercase=self.lowercase,
            max_characters=self.max_characters if is_train else None,
            max_length_ratio=self.max_length_ratio if is_train else None,
            exact_duplicates=self.unique and is_train,
        )
        fields = {"source_key": self.source_key, "target_key": self.target_key}
        read, folder = partial(read_pairs, fields=fields), path / UNITS_FOLDER / split
        return [Unit(n, pieces, read, cleaning, folder) for n, pieces in enumerate(plan)]

    def _tokenizers(
        self, units: Mapping[str, list[Unit[Pair]]], fractions: dict[str, float], path: Path
    ) -> tuple[Path, Path]:
        """Build the tokenizers that are not there yet: of sources, of targets."""
        if self.joint_vocabulary:
            sides = {TOKENIZER_FILE: (self.tokenizer, (0, 1))}
        else:
            target = self.target_tokenizer or self.tokenizer
            sides = {TOKENIZER_FILE: (self.tokenizer, (0,)), TARGET_TOKENIZER_FILE: (target, (1,))}
        for name, (kind, places) in sides.items():
            if not (path / name).exists():
                texts = (
                    pair[place] for pair in self._training(units, fractions) for place in places
                )
                tokenizer = build_tokenizer(
                    kind,
                    vocab_size=self.vocab_size,
                    end_token=self.end_token,
                    documents=texts,
                    start_token=self.start_token,
                    min_frequency=self.min_frequency,
                    lowercase=self.lowercase,
                    num_sentinels=self.num_sentinels,
                )
                write_atomically(path / name, tokenizer.to_str(pretty=True).encode())
        source, *rest = (path / name for name in sides)
        return source, rest[0] if rest else source

    def _training(
        self, units: Mapping[str, list[Unit[Pair]]], fractions: dict[str, float]
    ) -> Iterator[Pair]:
        """Read the pairs that vocabularies are learned from; for `char` all of them."""
        groups = units if self.tokenizer == CHAR else {"train": units["train"]}
        total = sum(unit.num_bytes for group in groups.values() for unit in group)
        stride = -(-total // TRAINING_BYTES) if self.tokenizer == BPE else 1
        for group in groups.values():
            for unit in group[::stride]:
                for piece, pair in unit.documents():
                    split = piece.split or split_of(pair.source, fractions, self.seed)
                    if split == "train" or self.tokenizer == CHAR:
                        yield pair

    def _tasks(
        self,
        units: Mapping[str, list[Unit[Pair]]],
        fractions: dict[str, float],
        tokenizers: tuple[Path, Path],
        path: Path,
    ) -> list[PairTask]:
        source, target = (load_tokenizer(file) for file in tokenizers)
        dtype = token_dtype(max(vocab_size_of(source), vocab_size_of(target)))
        target_end_token = target.token_to_id(self.end_token)
        assert target_end_token is not None
        return [
            PairTask(
                unit=unit,
                folder=path,
                tokenizer=tokenizers[0],
                end_token=source.token_to_id(self.end_token),
                fractions=fractions,
                seed=self.seed,
                chunk_tokens=self.chunk_kb * 1024 // dtype.itemsize,
                dtype=dtype.str,
                target_tokenizer=tokenizers[1],
                target_end_token=target_end_token,
            )
            for group in units.values()
            for unit in group
        ]
