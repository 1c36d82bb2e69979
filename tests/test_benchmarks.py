"""Benchmarks of the stream run, on next to nothing."""

from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate

from benchmarks import seq2seq_throughput, shuffle_quality, stream_tokens
from benchmarks.stream_images import NUM_SHARDS, image_sides, write_images
from benchmarks.stream_tokens import token_sides, write_tokens
from benchmarks.turns import Side, take_turns


def but_stock(sides: dict[str, Side]) -> dict[str, Side]:
    """Leave out webdataset, which leaves files open where it is not read to the end."""
    return {name: side for name, side in sides.items() if "webdataset" not in name}


def test_readers_of_images_give_every_byte_once(tmp_path: Path) -> None:
    num_images = 4 * NUM_SHARDS
    index, digest = write_images(tmp_path, num_images, 1000)
    sides = image_sides(index, tmp_path / "images.bin", 1000, 4)
    for name, turns in take_turns(but_stock(sides), num_images // 4, rounds=2).items():
        assert (turns[-1].epoch_samples, turns[-1].epoch_digest) == (num_images, digest), name


def test_readers_of_tokens_give_as_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_tokens, "CHUNK_TOKENS", 2**12)
    index = write_tokens(tmp_path, 2)
    sides = token_sides(index, tmp_path / "tokens.u16", 64, 8)
    turns = take_turns(but_stock(sides), 20, rounds=1)
    assert {turn.samples for (turn,) in turns.values()} >= {20 * 8}


def test_shuffle_quality_tells_good_orders_from_bad() -> None:
    mixed = np.random.default_rng(0).permutation(100_000)
    assert 0.8 < shuffle_quality.ratio(mixed, 64) < 1.2
    assert shuffle_quality.ratio(np.arange(100_000), 64) > 5
    order = shuffle_quality.ours(100_000, 64, 1024)
    assert np.array_equal(np.sort(order), np.arange(100_000))


def test_both_sides_of_the_throughput_benchmark_are_one_model() -> None:
    config = seq2seq_throughput.configure("fp32", num_steps=2)
    ours = instantiate(config.module, _convert_="all").network
    theirs = seq2seq_throughput.make_t5()
    sizes = [sorted(p.numel() for p in model.parameters()) for model in (ours, theirs)]
    assert sizes[0] == sizes[1]
    assert instantiate(config.datamodule, _convert_="all", _partial_=True)
