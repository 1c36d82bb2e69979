"""Data sets of pairs, written from the contract: documents two by two, each with its end token."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models

from datamodules.batch import IGNORED, PairBatch
from datamodules.facts import FACTS_FILE, TOKENIZER_FILE, PreparedData
from datamodules.index import Index, digest_bytes, read_index, write_index
from datamodules.pair_plan import PairPlan
from datamodules.pair_rows import PairRows
from datamodules.reader import RAISE, BadSamples
from datamodules.write import ShardWriter

START, END, TARGET_END = 0, 1, 2
FIRST_TOKEN = 10
SCHEMA = {
    "tokens.npy": {"codec": "npy", "dtype": "uint16"},
    "ends.npy": {"codec": "npy", "dtype": "uint32"},
}

Pair = tuple[tuple[int, ...], tuple[int, ...]]


def draw_pairs(num_pairs: int, *, longest: int, seed: int = 0) -> list[Pair]:
    """Pairs of random tokens and of lengths up to `longest`, end tokens among them."""
    rng = random.Random(seed)

    def draw(length: int, end: int) -> tuple[int, ...]:
        return (*(rng.randrange(FIRST_TOKEN, 60_000) for _ in range(length - 1)), end)

    lengths = [min(longest, max(2, int(rng.lognormvariate(2.5, 0.5)))) for _ in range(num_pairs)]
    return [
        (draw(length, END), draw(min(longest, max(2, length + rng.randint(-3, 3))), TARGET_END))
        for length in lengths
    ]


def write_pairs(
    path: Path, pairs: Sequence[Pair], shards: Sequence[int], chunk_tokens: int = 97
) -> Index:
    """Write pairs into shards of so many, in chunks that end anywhere."""
    path.mkdir(parents=True)
    facts, first = [], 0
    for number, size in enumerate(shards):
        documents = [side for pair in pairs[first : first + size] for side in pair]
        first += size
        tokens = np.concatenate([np.array(document, "<u2") for document in documents])
        ends = np.cumsum([len(document) for document in documents]) - 1
        with ShardWriter(path / f"{path.name}-{number:06d}.tar") as writer:
            for begin in range(0, len(tokens), chunk_tokens):
                chunk = tokens[begin : begin + chunk_tokens]
                own = ends[(ends >= begin) & (ends < begin + len(chunk))] - begin
                writer.write(len(chunk), {"tokens.npy": chunk, "ends.npy": own.astype("<u4")})
            facts.append(writer.finish([len(document) for document in documents]))
    assert first == len(pairs)
    write_index(path, schema=SCHEMA, tokenizer=f"../{TOKENIZER_FILE}", shards=facts)
    return read_index(path)


LONGEST, BUDGET = 40, 160
PAIRS = draw_pairs(300, longest=LONGEST)
SHARDS = [130, 1, 169]
"""Pairs of each shard of a data set of them."""


def make_rows(index: Index, bad_samples: BadSamples = RAISE, **settings: Any) -> PairRows:
    defaults = {
        "max_source_tokens": LONGEST,
        "max_target_tokens": LONGEST,
        "longer": "raise",
        "group_tokens": None,
        "seed": 3,
    }
    plan = PairPlan(index, **{**defaults, **settings})
    tokens = {"start_token": START, "end_token": END, "target_end_token": TARGET_END}
    return PairRows(index, plan, **tokens, bad_samples=bad_samples)


def pairs_in(batch: PairBatch) -> list[Pair]:
    """Pairs of a batch, held against everything that a batch promises; padding rows left out."""
    source, mask, inputs, targets = (
        batch[k] for k in ("source", "source_mask", "inputs", "targets")
    )
    assert source.dtype == inputs.dtype == targets.dtype == torch.int64
    assert mask.dtype == torch.bool
    assert mask.shape == source.shape
    assert inputs.shape == targets.shape
    found = []
    for row in range(len(source)):
        own = targets[row][targets[row] != IGNORED].tolist()
        length = int(mask[row].sum())
        assert mask[row, :length].all()
        assert (inputs[row, 0]) == START
        if not own:
            continue
        assert inputs[row, 1 : len(own)].tolist() == own[:-1]
        assert (targets[row, len(own) :] == IGNORED).all()
        assert own[-1] == TARGET_END
        assert source[row, length - 1] == END
        found.append((tuple(source[row, :length].tolist()), tuple(own)))
    return found


def groups_of(rows: PairRows, epoch: int) -> list[list[Pair]]:
    """Pairs of every group of an epoch, in the order of the data set."""
    sizes = rows.samples_per_block
    blocks = np.repeat(np.arange(len(sizes)), sizes)
    samples = np.concatenate([np.arange(size) for size in sizes])
    addresses = rows.plan(np.full_like(blocks, epoch), blocks, samples)
    return [pairs_in(batch) for batch in rows.batches(addresses[:, None])]


def text_of(number: int) -> tuple[str, str]:
    return f"source {number}", f"target\n{number} ä"


class PreparedPairs:
    """A corpus of pairs that is prepared already: a data set per split, and its facts."""

    def __init__(self, path: Path, splits: dict[str, list[Pair]], **facts: Any) -> None:
        texts = dict.fromkeys(("train", "val", "test"))
        for split, pairs in splits.items():
            write_pairs(path / split, pairs, [len(pairs)])
            if split != "train":
                lines = [json.dumps(text_of(n), ensure_ascii=False) for n in range(len(pairs))]
                content = "".join(f"{line}\n" for line in lines).encode()
                (path / split / "texts.jsonl").write_bytes(content)
                texts[split] = digest_bytes(content)
        tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}))
        tokenizer.save(str(path / TOKENIZER_FILE))
        self.path = path
        self.facts = {
            "kind": "pairs",
            "is_joint": True,
            "vocab_size": 60_000,
            "target_vocab_size": 60_000,
            "start_token": START,
            "end_token": END,
            "target_end_token": TARGET_END,
            "texts": texts,
            "shards": dict.fromkeys(splits, 1),
        } | facts
        (path / FACTS_FILE).write_text(json.dumps(self.facts))

    def prepare(self, data_dir: str | Path) -> PreparedData:
        return PreparedData(self.path, self.facts)
