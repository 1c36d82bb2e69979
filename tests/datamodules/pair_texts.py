"""Corpora of made-up pairs, and what their shards hold, read by the index alone."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.facts import PreparedData
from datamodules.index import digest_file, read_index
from datamodules.pair_corpora import PairCorpus
from datamodules.reader import ShardReader
from datamodules.tokenization import load_tokenizer

Pairs = list[tuple[str, str]]


def make_pairs(path: Path | None = None, **settings: Any) -> PairCorpus:
    defaults: dict[str, Any] = {
        "name": "pairs",
        "train": {"path": str(path)},
        "val": None,
        "test": None,
        "source_key": "de",
        "target_key": "en",
        "tokenizer": "byte",
        "target_tokenizer": None,
        "joint_vocabulary": True,
        "vocab_size": None,
        "min_frequency": None,
        "lowercase": False,
        "num_sentinels": 0,
        "end_token": "<|endoftext|>",
        "start_token": None,
        "empty": "raise",
        "max_characters": None,
        "max_length_ratio": None,
        "unique": False,
        "val_fraction": 0.1,
        "test_fraction": 0.1,
        "chunk_kb": 1,
        "shard_mb": 1 / 128,
        "num_processes": 1,
        "seed": 0,
    }
    return PairCorpus(**{**defaults, **settings})


def make_texts() -> Pairs:
    """Pairs of unequal lengths, with what looks like the end of a line and is none."""
    rng = random.Random(0)
    words = [
        "Haus",
        "naïve",
        "日本",
        "🙂",
        "\u2028",
        "\x0b",
        "\x85",
        "\r.",
        "<|endoftext|>",
        "A.",
        "0",
    ]

    def text() -> str:
        return " ".join(rng.choices(words, k=rng.randint(1, 60))) + "x"

    return [(text(), text()) for _ in range(200)]


def write_parallel(folder: Path, pairs: Pairs, end: str = "\n") -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    paths = {"source": folder / "all.de", "target": folder / "all.en"}
    for side, path in enumerate(paths.values()):
        path.write_bytes("".join(pair[side] + end for pair in pairs).encode())
    return {name: str(path) for name, path in paths.items()}


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def read_pairs(prepared: PreparedData) -> dict[str, Pairs]:
    """Pairs of each split, decoded from the shards by the index alone, checked with the facts."""
    facts, found = prepared.facts, {}
    target = "tokenizer.json" if facts["is_joint"] else "target_tokenizer.json"
    assert (prepared.path / "target_tokenizer.json").exists() != facts["is_joint"]
    tokenizers = [load_tokenizer(prepared.path / name) for name in ("tokenizer.json", target)]
    end_tokens = [facts["end_token"], facts["target_end_token"]]
    for split in facts["shards"]:
        index = read_index(prepared.path / split)
        reader, tokens = ShardReader(index), []
        for number in range(len(index.lengths)):
            region, dtype, offset, count = reader.array(number, "tokens.npy")
            tokens += np.frombuffer(reader.regions.view(region), dtype, count, offset).tolist()
        assert all(shard.num_documents % 2 == 0 for shard in index.shards)
        texts, place = [], 0
        for number, length in enumerate(index.documents.tolist()):
            *ids, end = tokens[place : place + length]
            assert end == end_tokens[number % 2]
            texts.append(tokenizers[number % 2].decode(ids))
            place += length
        assert place == len(tokens) == facts["tokens"][split]
        found[split] = list(zip(texts[::2], texts[1::2], strict=True))
        lengths = index.documents.reshape(-1, 2).tolist()
        for side, name in enumerate(("source", "target")):
            assert facts[f"{name}_tokens"][split] == sum(pair[side] for pair in lengths)
            assert facts[f"longest_{name}"][split] == max(pair[side] for pair in lengths)
        assert facts["pairs"][split] == len(lengths)
    return found


def read_texts(prepared: PreparedData, split: str) -> Pairs:
    path = prepared.path / split / "texts.jsonl"
    assert prepared.facts["texts"][split] == digest_file(path)
    # Lines of any reader: also those that end one at U+2028.
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()]
