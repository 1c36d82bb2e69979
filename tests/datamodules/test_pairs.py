"""Pairs in batches: against the pairs that were written, over ranks, workers and lives."""

import pickle
from collections import Counter
from collections.abc import Iterable
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules import pair_plan
from datamodules.batch import IGNORED, PairBatch
from datamodules.index import Index
from datamodules.loader import EvaluationLoader, TrainLoader, order_of
from datamodules.pair_plan import PairPlan
from datamodules.pair_rows import PairRows
from datamodules.reader import RAISE, BadSamples
from datamodules.tar import BadSampleError
from tests.datamodules.pair_shards import (
    END,
    START,
    TARGET_END,
    Pair,
    draw_pairs,
    write_pairs,
)

pytestmark = [
    # Workers are more than the cores of a small machine, and meant.
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    # Python 3.12 and later say so of every fork after torch's threads have started.
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

G, LONGEST = 12, 40
PAIRS = draw_pairs(300, longest=LONGEST)
SHARDS = [130, 1, 169]
BUDGET = 160


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "train", PAIRS, SHARDS)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_plan, "WINDOW_PAIRS", 50)


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


def groups_of(rows: PairRows, epoch: int) -> list[list[Pair]]:
    """Pairs of every group of an epoch, in the order of the data set."""
    sizes = rows.samples_per_block
    blocks = np.repeat(np.arange(len(sizes)), sizes)
    samples = np.concatenate([np.arange(size) for size in sizes])
    addresses = rows.plan(np.full_like(blocks, epoch), blocks, samples)
    return [pairs_in(batch) for batch in rows.batches(addresses[:, None])]


def plain_groups(pairs: list[Pair]) -> list[list[tuple[int, int]]]:
    """Lengths of the groups of a window, cut from the sorted pairs as the docstring says."""
    lengths = sorted(
        ((len(source), len(target)) for source, target in pairs),
        key=lambda pair: (max(pair), pair[1] - pair[0]),
    )
    groups: list[list[tuple[int, int]]] = [[]]
    for pair in lengths:
        longer = [*groups[-1], pair]
        if (max(s for s, _ in longer) + max(t for _, t in longer)) * len(longer) > BUDGET:
            groups.append([])
        groups[-1].append(pair)
    return groups


def test_groups_are_those_of_a_plain_planner_within_the_budget(index: Index) -> None:
    rows = make_rows(index, group_tokens=BUDGET)
    windows = [PAIRS[a:b] for a, b in pairwise(BOUNDS)]
    expected = [group for window in windows for group in plain_groups(window)]
    for epoch in range(2):
        groups = groups_of(rows, epoch)
        lengths = [[(len(source), len(target)) for source, target in own] for own in groups]
        assert [sorted(own) for own in lengths] == [sorted(own) for own in expected]
        for own in lengths:
            padded = (max(s for s, _ in own) + max(t for _, t in own)) * len(own)
            assert padded <= BUDGET


BOUNDS = [0, 43, 86, 130, 131, 173, 215, 257, 300]
"""Windows of at most 50 pairs of one shard, of about equal size."""


def test_pairs_of_equal_lengths_change_groups_with_the_epoch_and_the_seed(
    tmp_path: Path,
) -> None:
    same = [(tuple([10 + n] * 4 + [END]), tuple([10 + n] * 4 + [TARGET_END])) for n in range(40)]
    index = write_pairs(tmp_path / "train", same, [40])

    def groups(epoch: int, seed: int) -> list[frozenset[Pair]]:
        rows = make_rows(index, group_tokens=100, seed=seed)
        return [frozenset(group) for group in groups_of(rows, epoch)]

    assert [len(group) for group in groups(0, 3)] == [10] * 4
    assert groups(0, 3) == groups(0, 3)
    assert groups(0, 3) != groups(1, 3)
    assert groups(0, 3) != groups(0, 4)


def fill(groups: list[list[Pair]]) -> float:
    """Share of real tokens when each group is padded by itself."""
    lengths = [np.array([(len(source), len(target)) for source, target in g]) for g in groups]
    return sum(own.sum() for own in lengths) / sum(own.max(0).sum() * len(own) for own in lengths)


def test_groups_are_nine_tenths_full_where_pairs_as_they_come_are_half_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair_plan, "WINDOW_PAIRS", 8192)
    pairs = draw_pairs(8192, longest=100)
    index = write_pairs(tmp_path / "train", pairs, [8192], chunk_tokens=5000)
    groups = groups_of(make_rows(index, group_tokens=2048, **LIMITS), 0)
    assert fill(groups) > 0.9  # 0.93
    size = len(pairs) // len(groups)
    assert fill([pairs[n : n + size] for n in range(0, len(pairs), size)]) < 0.5


LIMITS = {"max_source_tokens": 100, "max_target_tokens": 100}


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


def test_long_pairs_are_named_dropped_or_cut(index: Index) -> None:
    long = [n for n, (source, _) in enumerate(PAIRS) if len(source) > 20]
    longest = max(range(len(PAIRS)), key=lambda n: len(PAIRS[n][0]))
    message = (
        rf"datamodule.max_source_tokens=20 -> {len(long)} of 300 pairs .* the longest of "
        rf"{len(PAIRS[longest][0])} tokens .*\(pair {longest}\) -> raise it"
    )
    with pytest.raises(ValueError, match=message):
        make_rows(index, max_source_tokens=20)
    for group_tokens in (None, BUDGET):
        limits = {"max_source_tokens": 20, "max_target_tokens": 18, "group_tokens": group_tokens}
        dropped = make_rows(index, longer="drop", **limits)
        kept = [pair for pair in PAIRS if len(pair[0]) <= 20 and len(pair[1]) <= 18]
        assert dropped._plan.num_dropped == 300 - len(kept) > 20
        assert Counter(chain(*groups_of(dropped, 0))) == Counter(kept)
        cut = make_rows(index, longer="cut", **limits)
        expected = [((*s[:-1][:19], END), (*t[:-1][:17], TARGET_END)) for s, t in PAIRS]
        assert Counter(chain(*groups_of(cut, 0))) == Counter(expected)
    with pytest.raises(ValueError, match=r"datamodule.longer=drop -> every pair of"):
        make_rows(index, longer="drop", max_source_tokens=1)


def test_group_that_has_no_room_for_the_longest_pair_is_refused(index: Index) -> None:
    longest = max(len(source) + len(target) for source, target in PAIRS)
    make_rows(index, group_tokens=longest)
    message = rf"datamodule.group_tokens={longest - 1} -> the longest pair alone has {longest} tok"
    with pytest.raises(ValueError, match=message):
        make_rows(index, group_tokens=longest - 1)


def test_documents_that_are_no_pairs_are_refused(index: Index, make_dataset, tmp_path) -> None:
    odd = make_dataset(tmp_path / "train", [[90]], document_tokens=30)
    with pytest.raises(ValueError, match=r"3 documents in a shard are no pairs"):
        make_rows(odd)


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
