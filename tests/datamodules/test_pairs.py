"""Pairs in batches: against the pairs that were written, over ranks, workers and lives."""

import pickle
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules import pair_plan
from datamodules.batch import IGNORED
from datamodules.index import Index
from datamodules.loader import EvaluationLoader, TrainLoader, order_of
from datamodules.pair_rows import PairRows
from datamodules.reader import BadSamples
from datamodules.tar import BadSampleError
from tests.datamodules.pair_shards import (
    BUDGET,
    PAIRS,
    SHARDS,
    Pair,
    groups_of,
    make_rows,
    pairs_in,
    write_pairs,
)

pytestmark = [
    # Workers are more than the cores of a small machine, and meant.
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    # Python 3.12 and later say so of every fork after torch's threads have started.
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

G = 12


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "train", PAIRS, SHARDS)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_plan, "WINDOW_PAIRS", 50)


def make_loader(rows: PairRows, rank: int = 0, world: int = 1, **settings: Any) -> TrainLoader:
    """Two epochs, their last steps filled up."""
    steps = 2 * -(-int(rows.samples_per_block.sum()) // G)
    defaults = {
        "micro_batch": G // world,
        "max_samples": steps * G,
        "num_workers": 0,
        "repeat_first_batch": False,
    }
    order = order_of(rows, seed=3, batch_samples=G, window_mb=0.004, tail="pad_mask")
    settings = {**defaults, **settings}
    return TrainLoader(rows, order, batch_samples=G, rank=rank, world_size=world, **settings)


def steps_of(loaders: Iterable[TrainLoader]) -> list[Counter[Pair]]:
    """Pairs of each optimizer step from the first on, over all ranks."""
    steps: list[Counter[Pair]] = []
    for loader in loaders:
        accumulation = len(loader) // (2 * -(-loader.stream_state()["samples_per_epoch"] // G))
        for number, batch in enumerate(loader):
            if number // accumulation == len(steps):
                steps.append(Counter())
            steps[number // accumulation].update(pairs_in(batch))
    return steps


@pytest.mark.parametrize("group_tokens", [None, BUDGET])
@pytest.mark.parametrize(("world", "micro_batch", "workers"), [(1, 12, 0), (3, 2, 0), (4, 3, 2)])
def test_epoch_has_each_pair_once(
    group_tokens: int | None, world: int, micro_batch: int, workers: int, index: Index
) -> None:
    settings = {"micro_batch": micro_batch, "num_workers": workers}
    rows = make_rows(index, group_tokens=group_tokens)
    steps = steps_of(make_loader(rows, rank, world, **settings) for rank in range(world))
    for epoch in (steps[: len(steps) // 2], steps[len(steps) // 2 :]):
        assert sum(epoch, Counter()) == Counter(PAIRS)
    reference = steps_of([make_loader(make_rows(index, group_tokens=group_tokens))])
    assert steps == reference
    assert steps[: len(steps) // 2] != steps[len(steps) // 2 :]


@pytest.mark.parametrize("group_tokens", [None, BUDGET])
def test_stream_resumes_in_the_middle_of_an_epoch_in_another_world(
    group_tokens: int | None, index: Index
) -> None:
    reference = steps_of([make_loader(make_rows(index, group_tokens=group_tokens))])
    at = len(reference) // 3
    before = make_loader(make_rows(index, group_tokens=group_tokens), 1, 2, micro_batch=2)
    list(islice(iter(before), 3 * at + 1))  # in the middle of an accumulation
    state = before.stream_state()

    def resume(position: int) -> list[Counter[Pair]]:
        loaders = []
        for rank in range(4):
            rows = pickle.loads(pickle.dumps(make_rows(index, group_tokens=group_tokens)))
            loaders.append(make_loader(rows, rank, 4, num_workers=2 if rank == 0 else 0))
            loaders[-1].restore({**state, "position": position})
        return steps_of(loaders)

    assert state["position"] == at * G
    assert resume(at * G) == reference[at:]
    assert resume((at - 1) * G)[: len(reference) - at] != reference[at:]


def test_state_of_other_groups_is_refused(index: Index) -> None:
    state = make_loader(make_rows(index, group_tokens=BUDGET)).stream_state()
    with pytest.raises(ValueError, match=r"max_source_tokens=41 -> the checkpoint's data stream"):
        make_loader(make_rows(index, group_tokens=BUDGET, max_source_tokens=41)).restore(state)
    ours = make_loader(make_rows(index, group_tokens=BUDGET + 1))
    same = {name: ours.stream_state()[name] for name in ("samples_per_epoch", "window", "samples")}
    message = rf"group_tokens={BUDGET + 1} -> the checkpoint's .*group_tokens={BUDGET}, "
    with pytest.raises(ValueError, match=message):  # even where both have as many
        ours.restore({**state, **same})


@pytest.mark.parametrize("group_tokens", [None, BUDGET])
@pytest.mark.parametrize(("world", "micro_batch", "workers"), [(1, 3, 2), (3, 2, 0)])
def test_divisor_is_the_steps_targets_over_its_micro_batches(
    group_tokens: int | None, world: int, micro_batch: int, workers: int, index: Index
) -> None:
    settings = {"micro_batch": micro_batch, "num_workers": workers}
    rows = make_rows(index, group_tokens=group_tokens)
    counts, divisors = [], []
    for rank in range(world):
        batches = list(make_loader(rows, rank, world, **settings))
        counts.append([int((batch["targets"] != IGNORED).sum()) for batch in batches])
        assert all(b["divisor"].dtype == torch.float32 for b in batches)  # pyright: ignore
        assert all(b["divisor"].shape == () for b in batches)
        divisors.append([batch["divisor"].item() for batch in batches])
    accumulation = G // (world * micro_batch)
    by_step = np.array(counts).reshape(world, -1, accumulation)
    expected = by_step.sum((0, 2)) / (world * accumulation)
    every = np.array(divisors).reshape(world, -1, accumulation)
    assert np.allclose(every, expected[None, :, None], rtol=1e-6)
    # A rank's own count is another number, and the padded step's a smaller one.
    assert not np.allclose(by_step, expected[None, :, None], rtol=1e-2)
    assert expected[len(expected) // 2 - 1] < 0.9 * expected.mean()


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 7), (3, 16)])
def test_evaluation_has_each_pair_once(world: int, micro_batch: int, index: Index) -> None:
    rows, seen = make_rows(index), []
    for rank in range(world):
        loader = EvaluationLoader(
            rows, micro_batch=micro_batch, max_samples=None, rank=rank, world_size=world
        )
        for batch in loader:
            assert len(batch["source"]) == micro_batch
            assert "divisor" not in batch
            seen += pairs_in(batch)
    assert Counter(seen) == Counter(PAIRS)


def test_pairs_in_a_damaged_chunk_predict_nothing(tmp_path: Path) -> None:
    index = write_pairs(tmp_path / "train", PAIRS[:60], [60], chunk_tokens=64)
    whole = groups_of(make_rows(index, group_tokens=BUDGET), 0)
    shard = tmp_path / "train" / "train-000000.tar"
    content = bytearray(shard.read_bytes())
    source, _ = PAIRS[20]
    place = content.index(np.array(source, "<u2").tobytes()[:8])
    content[place] ^= 1
    shard.write_bytes(content)
    with pytest.raises(BadSampleError, match="is not as it was written"):
        groups_of(make_rows(index, group_tokens=BUDGET), 0)
    starts = np.cumsum([0] + [len(side) for pair in PAIRS[:60] for side in pair])
    chunk = int(starts[40]) // 64
    bad = {
        pair
        for n, pair in enumerate(PAIRS[:60])
        if starts[2 * n] < 64 * (chunk + 1) and starts[2 * n + 2] > 64 * chunk
    }
    substituted = make_rows(index, BadSamples("substitute", 1), group_tokens=BUDGET)
    expected = [[pair for pair in group if pair not in bad] for group in whole]
    assert 1 < len(bad) < 20
    assert groups_of(substituted, 0) == expected
