"""Samples as others write and read them, what is random about them, and what is counted."""

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from datamodules import write
from datamodules.index import Index, read_index, write_index
from datamodules.loader import EvaluationLoader, TrainLoader, order_of
from datamodules.order import uniform
from datamodules.pack import PackedRows
from datamodules.rows import TextRows
from datamodules.samples import StoredSamples
from datamodules.workers import SampleSource
from datamodules.write import ShardWriter
from tests.datamodules import by_hand

SCHEMA = {"bin": {"codec": "bytes"}}
KEYS = [
    *("000000", "000001", "a/b/000002", "ünïcode/日本", "with space", "emoji-🙂", "x" * 99),
    *("y" * 150, "z" * 300, "deep/" * 40 + "name", "d.e/f", "-", "under_score"),
]


def content_of(number: int) -> bytes:
    return random.Random(number).randbytes(100 + 37 * number)


class Drawing:
    """A codec that gives a sample's number, key, and a draw from it."""

    def decode(self, members: Mapping[str, memoryview], key: np.uint64 | None) -> Any:
        if key is None:
            return len(members["bin"]), None, None
        return len(members["bin"]), int(key), float(uniform(key, 1)[0])

    def collate(self, samples: Sequence[Any]) -> list[Any]:
        return list(samples)

    def pad(self, batch: list[Any], num_samples: int) -> None:
        batch[num_samples:] = [None] * (len(batch) - num_samples)


class Contents(Drawing):
    """A codec that gives members as they are."""

    def decode(self, members: Mapping[str, memoryview], key: np.uint64 | None) -> Any:
        return {name: bytes(content) for name, content in members.items()}


def write_samples(path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    """Two shards by our writer, whose blocks have few samples; sizes of samples are all unlike."""
    monkeypatch.setattr(write, "BLOCK_BYTES", 4096)
    path.mkdir()
    facts = []
    for shard in range(2):
        with ShardWriter(path / f"train-{shard:06d}.tar") as writer:
            for number, key in enumerate(KEYS, start=shard * len(KEYS)):
                content = content_of(number)
                writer.write(len(content), {"bin": content, "txt": key.encode()}, key)
            facts.append(writer.finish())
    write_index(path, schema=SCHEMA, tokenizer=None, shards=facts)
    return read_index(path)


def read_all(index: Index) -> list[dict[str, bytes]]:
    source = StoredSamples(index, Contents(), seed=0)
    loader = EvaluationLoader(source, micro_batch=1, max_samples=None, rank=0, world_size=1)
    return [sample for batch in loader for sample in batch]


def without_key(samples: list[dict[str, Any]]) -> list[dict[str, bytes]]:
    return [{k: v for k, v in sample.items() if k != "__key__"} for sample in samples]


def test_stock_webdataset_reads_our_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = write_samples(tmp_path / "train", monkeypatch)
    assert len(index.blocks) > 4
    theirs = [sample for s in index.shards for sample in by_hand.read_with_webdataset(Path(s.url))]
    assert [sample["__key__"] for sample in theirs] == 2 * KEYS
    assert [sample["bin"] for sample in theirs] == [content_of(n) for n in range(2 * len(KEYS))]
    assert read_all(index) == without_key(theirs)


def test_samples_of_stock_shard_writer_are_read(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    pattern = str(tmp_path / "train" / "stock-%04d.tar")
    with webdataset.ShardWriter(pattern, maxcount=5, verbose=0) as writer:
        for number, key in enumerate(KEYS):
            sample = {"__key__": key, "bin": content_of(number), "cls": number, "SEG.txt": key}
            writer.write(sample if number % 3 else {**sample, "json": {"n": number}})
    tars = sorted((tmp_path / "train").glob("*.tar"))
    assert len(tars) == 3
    theirs = [sample for tar in tars for sample in by_hand.read_with_webdataset(tar)]
    index = by_hand.write_index(tmp_path / "train", {**SCHEMA, "json": {"optional": "true"}})
    assert read_all(index) == without_key(theirs)
    ours = [sample.key for tar in tars for sample in by_hand.stored_samples(tar)]
    assert ours == [sample["__key__"] for sample in theirs] == KEYS


@pytest.mark.parametrize(
    ("key", "extension"), [("a.b", "bin"), ("__a__/b", "bin"), ("a", "BIN"), ("last", "bin")]
)
def test_sample_that_would_be_read_under_another_name_is_refused(
    key: str, extension: str, tmp_path: Path
) -> None:
    with ShardWriter(tmp_path / "train-000000.tar") as writer:
        writer.write(1, {"bin": b"1"}, "last")
        with pytest.raises(ValueError, match=rf"\(shard train-000000.tar, key {key}\)"):
            writer.write(1, {extension: b"2"}, key)
        assert writer.finish().shard.num_samples == 1


# Randomness


def make_loader(
    source: SampleSource, rank: int = 0, world: int = 1, workers: int = 0, epochs: int = 2
) -> TrainLoader:
    num_samples = int(source.samples_per_block.sum())
    return TrainLoader(
        source,
        order_of(source, seed=0, batch_samples=4, window_mb=0.01, tail="carry"),
        batch_samples=4,
        micro_batch=1,
        max_samples=epochs * num_samples // 4 * 4,
        num_workers=workers,
        repeat_first_batch=False,
        rank=rank,
        world_size=world,
    )


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    return write_samples(tmp_path / "samples", monkeypatch)


def draws(index: Index, world: int, workers: int = 0, skip: int = 0, seed: int = 5) -> list[Any]:
    ranks = []
    for rank in range(world):
        loader = make_loader(StoredSamples(index, Drawing(), seed=seed), rank, world, workers)
        loader.restore({**loader.stream_state(), "position": skip})
        ranks.append([sample for batch in loader for sample in batch])
    return [sample for samples in zip(*ranks, strict=True) for sample in samples]


def test_keys_do_not_depend_on_ranks_workers_and_resume(index: Index) -> None:
    reference = draws(index, 1)
    assert draws(index, 4) == reference
    assert draws(index, 2, skip=12) == reference[12:]
    assert draws(index, 1, workers=2) == reference
    keys = [key for _, key, _ in reference]
    assert len(set(keys)) == len(keys) == 52  # of 26 samples in two epochs
    assert len({size for size, _, _ in reference}) == 26
    assert not set(keys) & {key for _, key, _ in draws(index, 1, seed=6)}


def test_evaluation_has_nothing_random(index: Index) -> None:
    source = StoredSamples(index, Drawing(), seed=5)
    for rank in range(3):
        loader = EvaluationLoader(source, micro_batch=2, max_samples=None, rank=rank, world_size=3)
        samples = [sample for batch in loader for sample in batch if sample is not None]
        assert {key for _, key, _ in samples} == {None}


def plain_uniform(key: int, number: int) -> float:
    """As `uniform`, in Python's integers."""

    def mix(value: int) -> int:
        value = (value + 0x9E3779B97F4A7C15) % 2**64
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        return value ^ (value >> 31)

    return (mix(mix(number) ^ key) >> 11) / 2**53


def test_uniform_is_fixed() -> None:
    for key in (0, 1, 2**64 - 1, 0x0123456789ABCDEF):
        expected = [plain_uniform(key, number) for number in range(20)]
        assert uniform(np.uint64(key), 20).tolist() == expected
    golden = ["0x1.92fd86d44bfeap-2", "0x1.dc5b68e72e89cp-2", "0x1.b9730bf3fc5d8p-4"]
    assert [value.hex() for value in uniform(np.uint64(7), 3).tolist()] == golden


def test_uniform_is_uniform_within_a_key_and_over_keys() -> None:
    within = uniform(np.uint64(3), 64_000)
    over = np.concatenate([uniform(np.uint64(key), 2) for key in range(32_000)])
    for numbers in (within, over, over[::2]):
        assert numbers.min() >= 0
        assert numbers.max() < 1
        counts, _ = np.histogram(numbers, 64, (0, 1))
        expected = len(numbers) / 64
        # 63 degrees of freedom: 63 is the mean, and 120 is passed once in 50,000 times.
        assert 25 < ((counts - expected) ** 2 / expected).sum() < 120
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03


# The meter


@pytest.fixture
def text_index(make_dataset: Callable[..., Index], tmp_path: Path) -> Index:
    return make_dataset(tmp_path / "text", [[700, 900, 50], [2000], [10, 1500, 330]])


def stored_source(index: Index, text_index: Index) -> SampleSource:
    return StoredSamples(index, Drawing(), seed=5)


def text_source(index: Index, text_index: Index) -> SampleSource:
    return TextRows(text_index, sequence_length=16, document_mask=False, seed=1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make", [stored_source, text_source])
def test_meter_counts_what_was_handed_over(
    make: Callable[..., SampleSource], workers: int, index: Index, text_index: Index
) -> None:
    loader = make_loader(make(index, text_index), rank=1, world=2, workers=workers)
    assert not any(loader.counters().values())
    batches = list(loader)
    counters = loader.counters()
    assert counters["samples"] == len(batches) == len(loader)
    if make is text_source:
        expected = len(batches) * 17 * 2  # T and one more token of uint16
    else:
        sizes = {
            sample.members["bin"][1]: sample.stop - sample.start
            for shard in index.shards
            for sample in by_hand.stored_samples(Path(shard.url))
        }
        expected = sum(sizes[size] for ((size, _, _),) in batches)
    assert counters["bytes"] == expected
    assert counters["bad_samples"] == 0


def test_meter_of_packed_rows_counts_tokens_of_documents(
    make_dataset: Callable[..., Index], tmp_path: Path
) -> None:
    index = make_dataset(tmp_path / "train", [[600, 150], [250]], document_tokens=50)
    loader = make_loader(PackedRows(index, sequence_length=120, end_token=0))
    batches = list(loader)
    counters = loader.counters()
    assert counters["samples"] == len(batches)
    handed = sum(int((batch["targets"] >= 0).sum()) for batch in batches)
    assert counters["bytes"] == 2 * handed


def test_meter_runs_ahead_of_the_loop_only_by_what_is_read_ahead(index: Index) -> None:
    loader = make_loader(StoredSamples(index, Drawing(), seed=5), epochs=20)
    taken = sum(len(batch) for batch in islice(iter(loader), 30))
    assert taken <= loader.counters()["samples"] <= taken + 1
