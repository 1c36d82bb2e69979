"""What preparing any corpus has in common: once for its settings and sources, by one process."""

import json
import shutil
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from datamodules.facts import FACTS_FILE, PreparedData
from datamodules.index import digest_bytes, write_atomically
from datamodules.processes import exclusive
from datamodules.sources import SourceFile, digest_sources
from datamodules.tokenization import BPE, KINDS, WORD, check_sentinels
from datamodules.units import SPLITS, MergedSplit

UNITS_FOLDER = "units"
_DIGEST_CACHE = ".source_digests.json"

TRAINING_BYTES = 256 * 2**20
"""Text that a BPE vocabulary is trained on at most, spread evenly over the corpus: more changes few
merges, and the trainer holds its words in memory."""


def prepare_once(
    name: str,
    data_dir: str | Path,
    files: list[SourceFile],
    settings: Mapping[str, Any],
    build: Callable[[Path], dict[str, Any]],
) -> PreparedData:
    """Find prepared data below `data_dir`, or build it there; others that ask meanwhile wait.

    Args:
        name: first part of the name of the folder.
        data_dir: folder of prepared data.
        files: what is prepared.
        settings: what the bytes of the prepared data depend on, besides the files.
        build: fills a folder, in which an interrupted call may have left finished units of work,
            and returns the facts.
    """
    data_dir = Path(data_dir)
    content = [settings, digest_sources(files, data_dir / _DIGEST_CACHE)]
    digest = digest_bytes(json.dumps(content, sort_keys=True).encode())[:12]
    path = data_dir / f"{name}-{digest}"
    if not (path / FACTS_FILE).exists():
        with exclusive(data_dir / f".{path.name}.lock"):
            if not (path / FACTS_FILE).exists():
                path.mkdir(parents=True, exist_ok=True)
                for leftover in path.rglob("*.tmp"):
                    leftover.unlink()
                facts = {"digest": digest, **build(path)}
                # Last, since its presence says that the rest is complete.
                write_atomically(path / FACTS_FILE, json.dumps(facts, indent=1).encode() + b"\n")
                shutil.rmtree(path / UNITS_FOLDER)
    facts = json.loads((path / FACTS_FILE).read_bytes())
    return PreparedData(path, {"path": str(path), **facts})


def check_sizes(corpus: Any) -> None:
    """Refuse sizes and shares of a corpus of text that cannot be.

    Args:
        corpus: has `chunk_kb`, `num_sentinels`, and what `check_shares` looks at.

    Raises:
        ValueError: one is too small, or nothing is left to train on.
    """
    check_least(corpus, chunk_kb=1)  # a part of no byte would never end
    check_sentinels(corpus.num_sentinels)
    check_shares(corpus)


def check_shares(corpus: Any) -> None:
    """Refuse sizes of shards and shares of splits that cannot be.

    Args:
        corpus: has `shard_mb`, `seed`, `val_fraction` and `test_fraction`.

    Raises:
        ValueError: one is too small, or nothing is left to train on.
    """
    check_least(corpus, shard_mb=2**-20, seed=0)
    val, test = corpus.val_fraction, corpus.test_fraction
    if min(val, test) < 0 or not val + test < 1:
        raise ValueError(
            f"corpus.val_fraction={val}, corpus.test_fraction={test} -> nothing is left to train "
            "on -> their sum must be below 1"
        )


def check_least(corpus: object, **least: float) -> None:
    """Refuse numbers below the least that each may be; the message names the key."""
    for key, bound in least.items():
        if (value := getattr(corpus, key)) < bound:
            raise ValueError(f"corpus.{key}={value} -> it is a number -> use {bound} or more")


def check_bounds(corpus: object, **kinds: Any) -> None:
    """Refuse settings that bound something and are no number from 1 on, or None.

    Args:
        corpus: has the settings.
        **kinds: type, or union of types, of the number by setting.

    Raises:
        ValueError: the first that is none.
    """
    for key, kind in kinds.items():
        value = getattr(corpus, key)
        if value is not None and not (isinstance(value, kind) and value >= 1):
            raise ValueError(
                f"corpus.{key}={value} -> no such bound is possible -> give a number from 1 on, or "
                "null for none"
            )


def check_splits(
    fractions: Mapping[str, float], merged: Mapping[str, Any], path: str, seed: int
) -> None:
    """Refuse a split of some share into which nothing fell.

    Raises:
        ValueError: there is one.
    """
    for split, fraction in fractions.items():
        if fraction > 0 and split not in merged:
            raise ValueError(
                f"corpus.val_fraction={fractions['val']}, corpus.test_fraction={fractions['test']} "
                f"-> nothing of {path} fell into {split} -> raise its share, change corpus.seed="
                f"{seed}, or take a larger corpus"
            )


def shares_of(val_fraction: float, test_fraction: float) -> dict[str, float]:
    """Share of each split, in order."""
    return {
        "train": 1 - val_fraction - test_fraction,
        "val": val_fraction,
        "test": test_fraction,
    }


def fractions_of(corpus: Any, given: Container[str]) -> dict[str, float]:
    """Share of each split of what `train` is taken from; 0 for one with files of its own.

    Args:
        corpus: has `val_fraction` and `test_fraction`.
        given: the splits that have files.
    """
    shares = {"val": corpus.val_fraction, "test": corpus.test_fraction}
    val, test = (0.0 if split in given else share for split, share in shares.items())
    return shares_of(val, test)


def vocabulary_settings(tokenizer: str, vocab_size: int | None) -> dict[str, Any]:
    """Settings of a vocabulary: its kind, or a digest of the file; and its size where we train."""
    if tokenizer not in KINDS:
        # A path that does not exist is reported where the tokenizer is built.
        file = Path(tokenizer)
        digest = digest_bytes(file.read_bytes()) if file.is_file() else None
        return {"tokenizer": digest, "vocab_size": None}
    return {
        "tokenizer": tokenizer,
        "vocab_size": vocab_size if tokenizer in (BPE, WORD) else None,
    }


def vocab_size_of(tokenizer: Tokenizer) -> int:
    """Size of a table with a row for each token."""
    # Numbers of an existing vocabulary may have gaps, so that counting them is not enough.
    return max(tokenizer.get_vocab().values()) + 1


def count_splits(merged: Mapping[str, MergedSplit], name: str) -> dict[str, int | None]:
    """Give a count of each split; None where there is no such split, so that keys stay."""
    return {split: merged[split].text[name] if split in merged else None for split in SPLITS}
