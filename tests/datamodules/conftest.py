"""Data sets whose tokens tell where they come from, and corpora of made-up text."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules import write
from datamodules.corpora import Corpus
from datamodules.index import Index, read_index, write_index
from datamodules.write import ShardWriter

SCHEMA = {
    "tokens.npy": {"codec": "npy", "dtype": "uint16"},
    "ends.npy": {"codec": "npy", "dtype": "uint32"},
}


@pytest.fixture
def make_dataset(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Index]:
    """Write shards of chunks whose tokens count through the data set, two chunks a block."""

    def make(
        path: Path,
        shards: list[list[int]],
        ends: list[int] | None = None,
        document_tokens: int | None = None,
    ) -> Index:
        monkeypatch.setattr(write, "BLOCK_BYTES", 4096)
        path.mkdir(parents=True)
        facts, first = [], 0
        for number, lengths in enumerate(shards):
            with ShardWriter(path / f"train-{number:06d}.tar") as writer:
                for length in lengths:
                    tokens = np.arange(first, first + length, dtype="<u2")
                    first += length
                    arrays = {"tokens.npy": tokens, "ends.npy": np.array(ends or [], "<u4")}
                    writer.write(length, arrays)
                documents = [document_tokens] * (sum(lengths) // (document_tokens or 1))
                facts.append(writer.finish(documents if document_tokens else []))
        write_index(path, schema=SCHEMA, tokenizer="none", shards=facts)
        return read_index(path)

    return make


@pytest.fixture
def make_corpus() -> Callable[..., Corpus]:
    def make(path: Path | str, **settings: Any) -> Corpus:
        defaults: dict[str, Any] = {
            "name": "made-up",
            "suffixes": [".txt", ".jsonl", ".parquet"],
            "text_key": "text",
            "tokenizer": "byte",
            "vocab_size": None,
            "end_token": "<|endoftext|>",
            "val_fraction": 0.1,
            "test_fraction": 0.1,
            "chunk_kb": 1,
            "shard_mb": 1 / 64,
            "num_processes": 1,
            "seed": 0,
        }
        return Corpus(path=str(path), **{**defaults, **settings})

    return make


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Texts with characters of one to four bytes, line ends, and a special token's spelling."""
    rng = random.Random(0)
    words = ["plain", "naïve", "日本", "🙂", "\n", "\r\n", "  ", "\t", "<|endoftext|>", "A.", "0"]
    return [" ".join(rng.choices(words, k=rng.randint(1, 400))) for _ in range(150)]


@pytest.fixture
def jsonl(tmp_path: Path, documents: list[str]) -> Path:
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path
