"""Each way in which shards go bad, through each kind of sample, raised and substituted."""

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.index import Index, read_index
from datamodules.loader import EvaluationLoader, TrainLoader, order_of
from datamodules.pack import PackedRows
from datamodules.reader import BadSamples
from datamodules.rows import TextRows
from datamodules.samples import StoredSamples
from datamodules.tar import BadSampleError
from datamodules.workers import SampleSource
from tests.datamodules.damages import (
    CHUNKS,
    DAMAGES,
    NUM_SHARDS,
    SECOND,
    Damage,
    edit,
    flipped_size,
    intact,
    newer_of_equal_size,
    truncated_in_a_member,
    write_dataset,
)


class TokensCodec:
    """A codec of samples: their tokens."""

    def decode(self, members: Mapping[str, memoryview], key: np.uint64 | None) -> list[int]:
        content = bytes(members["tokens.npy"])
        if content[:6] != b"\x93NUMPY":
            raise ValueError("no array")
        tokens = np.frombuffer(content[128:], "<u2")
        if b"<u2" not in content[:128]:
            raise ValueError("holds uint32, not uint16")
        return tokens.tolist()

    def collate(self, samples: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        return {"inputs": torch.tensor(samples)}

    def pad(self, batch: dict[str, torch.Tensor], num_samples: int) -> None:
        batch["inputs"][num_samples:] = -1


def text(index: Index, bad: BadSamples) -> SampleSource:
    return TextRows(index, sequence_length=16, document_mask=True, seed=1, bad_samples=bad)


def packed(index: Index, bad: BadSamples) -> SampleSource:
    return PackedRows(index, sequence_length=64, end_token=9, bad_samples=bad)


def stored(index: Index, bad: BadSamples) -> SampleSource:
    return StoredSamples(index, TokensCodec(), seed=1, bad_samples=bad)


SOURCES = [text, packed, stored]
MakeSource = Callable[[Index, BadSamples], SampleSource]


def evaluate(source: SampleSource, world: int = 1) -> list[list[dict[str, torch.Tensor]]]:
    return [
        list(EvaluationLoader(source, micro_batch=1, max_samples=None, rank=r, world_size=world))
        for r in range(world)
    ]


def train(source: SampleSource, rank: int = 0, world: int = 1, workers: int = 0) -> TrainLoader:
    """Two epochs, and a step of the third."""
    order = order_of(source, seed=0, batch_samples=4, window_mb=1, tail="carry")
    num_samples = 2 * int(source.samples_per_block.sum()) // 4 * 4 + 4
    return TrainLoader(
        source,
        order,
        batch_samples=4,
        micro_batch=1,
        max_samples=num_samples,
        num_workers=workers,
        repeat_first_batch=False,
        rank=rank,
        world_size=world,
    )


def equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("make", SOURCES)
def test_bad_sample_is_raised_with_shard_key_offset_and_remedy(
    make: MakeSource, damage: Callable[[Path], Damage], tmp_path: Path
) -> None:
    index, (_, message) = damage(tmp_path / "train")
    source = make(index, BadSamples("raise", 0))
    with pytest.raises(BadSampleError, match=message) as caught:
        evaluate(source)
    assert re.search(rf"-> .*\(shard {SECOND}, ", str(caught.value))
    assert str(caught.value).startswith(f"data set {tmp_path / 'train'}: ")


@pytest.mark.parametrize("damage", [intact, *DAMAGES])
@pytest.mark.parametrize("make", SOURCES)
def test_bad_sample_is_substituted_by_the_next(
    make: MakeSource,
    damage: Callable[[Path], Damage],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    index, (bad, _) = damage(tmp_path / "train")
    every = range(NUM_SHARDS * CHUNKS)
    substitutes = {n: next(m % 8 for m in range(n + 1, n + 8) if m % 8 not in bad) for n in bad}
    # As if the others had been written in their places: no position shifts.
    reference = make(write_dataset(tmp_path / "reference", substitutes), BadSamples("raise", 0))
    policy = BadSamples("substitute", len(bad), tmp_path / "bad_samples.jsonl")
    assert equal(evaluate(make(index, policy)), evaluate(reference))
    assert equal(evaluate(make(index, policy), 3), evaluate(reference, 3))
    (tmp_path / "bad_samples.jsonl").unlink(missing_ok=True)

    whole = train(make(index, policy))
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        batches = list(whole)
    assert equal(batches, list(train(reference)))
    assert whole.counters()["bad_samples"] == len(bad) == len(caplog.records)
    if bad:
        listed = [json.loads(s) for s in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
        assert {line["sample"]: line["substitute"] for line in listed} == substitutes
        assert len(listed) == len(bad)
        assert all(SECOND in line["why"] for line in listed)
    by_rank = [list(train(make(index, policy), rank, 2)) for rank in range(2)]
    of_two = [batch for pair in zip(*by_rank, strict=True) for batch in pair]
    assert equal(of_two, batches)
    assert len(bad) < len(every)


@pytest.mark.parametrize("make", SOURCES)
def test_substitution_is_the_same_in_worker_processes(make: MakeSource, tmp_path: Path) -> None:
    index, (bad, _) = flipped_size(tmp_path / "train")
    policy = BadSamples("substitute", len(bad))
    loader = train(make(index, policy), workers=2)
    assert equal(list(loader), list(train(make(index, policy))))
    assert len(bad) <= loader.counters()["bad_samples"] <= 2 * len(bad)  # met by one or both


@pytest.mark.parametrize("make", SOURCES)
def test_substitution_ends_at_its_limit(make: MakeSource, tmp_path: Path) -> None:
    index, (bad, _) = newer_of_equal_size(tmp_path / "train")
    message = rf"max_bad_samples={len(bad) - 1} -> one more sample is bad: .*shard {SECOND}, key"
    with pytest.raises(BadSampleError, match=message):
        evaluate(make(index, BadSamples("substitute", len(bad) - 1)))


def test_data_of_nothing_but_bad_samples_is_raised(tmp_path: Path) -> None:
    index = write_dataset(tmp_path / "train")
    for shard in (tmp_path / "train").glob("*.tar"):
        shard.unlink()
    with pytest.raises(BadSampleError, match=r"No such file .*\(shard train-000000.tar"):
        evaluate(stored(index, BadSamples("substitute", 100)))


@pytest.mark.parametrize("allow_short", [False, True])
def test_absent_and_grown_shards_are_refused_at_the_start(
    allow_short: bool, tmp_path: Path
) -> None:
    write_dataset(tmp_path / "train")
    size = (tmp_path / "train" / SECOND).stat().st_size
    edit(tmp_path / "train" / SECOND, lambda content: content + bytes(512))
    message = rf"bytes in the index {size}, found {size + 512} .*\(shard {SECOND}\)"
    with pytest.raises(ValueError, match=message):
        read_index(tmp_path / "train", allow_short=allow_short)
    (tmp_path / "train" / SECOND).unlink()
    with pytest.raises(ValueError, match=rf"no such file .*\(shard {SECOND}\)"):
        read_index(tmp_path / "train", allow_short=allow_short)


def test_shard_cut_short_is_refused_unless_its_samples_are_substituted(tmp_path: Path) -> None:
    index, _ = truncated_in_a_member(tmp_path / "train")
    with pytest.raises(ValueError, match=rf"bytes in the index .*\(shard {SECOND}\)"):
        read_index(tmp_path / "train")
    assert read_index(tmp_path / "train", allow_short=True).digest == index.digest
