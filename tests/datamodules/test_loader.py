from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.batch import IGNORED
from datamodules.index import Index
from datamodules.loader import EvaluationLoader, TrainLoader, order_of
from datamodules.rows import TextRows
from tests.datamodules.lives import Numbers

pytestmark = [
    # Three workers are more than the cores of a small machine, and meant.
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    # Python 3.12 and later say so of every fork after torch's threads have started.
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

LENGTHS = [[700, 900, 50], [2000], [10, 1500, 330]]
G = 40


@pytest.fixture
def index(make_dataset: Callable[..., Index], tmp_path: Path) -> Index:
    return make_dataset(tmp_path / "train", LENGTHS)


def make_rows(index: Index) -> TextRows:
    return TextRows(index, sequence_length=16, document_mask=False, seed=1)


def make_loader(index: Index, rank: int = 0, world: int = 1, **settings: Any) -> TrainLoader:
    defaults = {
        "seed": 1,
        "batch_samples": G,
        "micro_batch": G // world,
        "max_samples": 20 * G,
        "window_mb": 1,
        "tail": "drop",
        "num_workers": 0,
        "repeat_first_batch": False,
    }
    settings = {**defaults, **settings}
    keys = {key: settings.pop(key) for key in ("seed", "window_mb", "tail")}
    rows = make_rows(index)
    order = order_of(rows, batch_samples=settings["batch_samples"], **keys)
    return TrainLoader(rows, order, rank=rank, world_size=world, **settings)


def samples_per_epoch(loader: TrainLoader) -> int:
    return loader.stream_state()["samples_per_epoch"]


def global_steps(index: Index, world: int, **settings: Any) -> list[list[int]]:
    """First tokens of the rows of each optimizer step over all ranks, sorted."""
    ranks = [make_loader(index, rank, world, **settings) for rank in range(world)]
    micro_batches = [[batch["inputs"][:, 0].tolist() for batch in loader] for loader in ranks]
    assert len({len(batches) for batches in micro_batches}) == 1
    assert len(micro_batches[0]) == len(ranks[0])
    accumulation = len(ranks[0]) // 20
    return [
        sorted(
            token
            for batches in micro_batches
            for batch in batches[step * accumulation : (step + 1) * accumulation]
            for token in batch
        )
        for step in range(20)
    ]


def test_epoch_has_each_row_at_most_once_and_drops_less_than_a_step(index: Index) -> None:
    total = int(make_rows(index).samples_per_block.sum())
    loader = make_loader(index, max_samples=10**6)
    assert total - G < samples_per_epoch(loader) <= total
    batches = [next(batches)["inputs"] for batches in [iter(loader)] for _ in range(20)]
    steps = samples_per_epoch(loader) // G
    for epoch in range(2):
        rows = torch.cat(batches[epoch * steps : (epoch + 1) * steps])
        # Rows of an epoch do not overlap, so no token is an input twice.
        assert len(rows.unique()) == rows.numel() == samples_per_epoch(loader) * 16
    assert not torch.equal(batches[0], batches[steps])


@pytest.mark.parametrize("world", [1, 2, 4, 8, 5, 10])
def test_global_batches_do_not_depend_on_the_world(index: Index, world: int) -> None:
    reference = global_steps(index, 1)
    assert global_steps(index, world) == reference
    assert global_steps(index, world, micro_batch=1) == reference
    assert global_steps(index, world, seed=2) != reference


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (1, 2), (1, 3), (4, 2), (5, 3)])
def test_batches_do_not_depend_on_workers(index: Index, world: int, workers: int) -> None:
    for rank in {0, world - 1}:
        settings = {"micro_batch": 2, "max_samples": 10 * G}
        here = list(make_loader(index, rank, world, **settings))
        there = list(make_loader(index, rank, world, num_workers=workers, **settings))
        assert len(here) == len(there) == 10 * G // world // 2
        for ours, theirs in zip(here, there, strict=True):
            assert torch.equal(ours["inputs"], theirs["inputs"])
            assert torch.equal(ours["targets"], theirs["targets"])


def test_stream_resumes_at_next_sample_in_another_world(index: Index) -> None:
    reference = global_steps(index, 1)
    before = make_loader(index, 1, 4, micro_batch=5, num_workers=2)
    list(islice(iter(before), 7 * 2))
    state = before.stream_state()
    assert state["position"] == 7 * G

    def resume(state: dict[str, Any]) -> list[list[int]]:
        steps: list[list[int]] = [[] for _ in range(20)]
        for rank in range(8):
            loader = make_loader(index, rank, 8, num_workers=3 if rank == 0 else 0)
            loader.restore(state)
            assert len(loader) == 20  # of the whole run
            for step, batch in enumerate(loader, start=state["position"] // G):
                steps[step] += batch["inputs"][:, 0].tolist()
        return [sorted(step) for step in steps]

    assert resume(state)[7:] == reference[7:]
    assert resume({**state, "position": 8 * G})[8:] == reference[8:]
    shifted = resume({**state, "position": 6 * G})
    assert shifted[6:19] != reference[7:]  # a stream that is a step off would be noticed


def test_position_moves_when_a_step_has_been_handed_over(index: Index) -> None:
    loader = make_loader(index, micro_batch=10, num_workers=2)
    positions = []
    for _ in islice(iter(loader), 9):
        positions.append(loader.stream_state()["position"])
    assert positions == [0, 0, 0, G, G, G, G, 2 * G, 2 * G]
    assert loader.seconds_waited > 0


def test_state_is_the_same_on_every_rank_and_epoch_follows(index: Index) -> None:
    loaders = [make_loader(index, rank, 2) for rank in range(2)]
    for loader in loaders:
        list(islice(iter(loader), 10))
    assert loaders[0].stream_state() == loaders[1].stream_state()
    (passes,) = loaders[0].epochs.values()
    assert passes == 10 * G / samples_per_epoch(loaders[0])


@pytest.mark.parametrize(
    ("name", "settings"),
    [("seed", {"seed": 9}), ("batch_samples", {"batch_samples": 20, "micro_batch": 20})],
)
def test_state_of_other_settings_is_refused_with_both_values(
    index: Index, name: str, settings: dict[str, int]
) -> None:
    other = make_loader(index, **settings)
    expected = {"seed": 1, "batch_samples": G}[name]
    message = rf"{name}={settings[name]} -> the checkpoint's data stream has {name}={expected}"
    with pytest.raises(ValueError, match=message):
        other.restore(make_loader(index).stream_state())


def test_state_of_other_data_is_refused(
    index: Index, make_dataset: Callable[..., Index], tmp_path: Path
) -> None:
    other = make_dataset(tmp_path / "other", [[700, 900, 51], *LENGTHS[1:]])
    with pytest.raises(ValueError, match=rf"index_digest={other.digest}.*{index.digest}"):
        make_loader(other).restore(make_loader(index).stream_state())


def test_batch_that_does_not_divide_or_fit_is_refused(index: Index) -> None:
    with pytest.raises(ValueError, match=r"batch_samples=40 -> not a multiple of micro_batch=12"):
        make_loader(index, micro_batch=12)
    with pytest.raises(ValueError, match=r"batch_samples=9000 -> the training split has only"):
        make_loader(index, batch_samples=9000, micro_batch=9000)


def test_lanes_that_do_not_match_the_world_warn(
    index: Index, caplog: pytest.LogCaptureFixture
) -> None:
    make_loader(index, 0, 4)
    assert not caplog.records
    make_loader(index, 0, 3, batch_samples=192, micro_batch=64)  # 64 lanes
    assert "not a multiple of 3 ranks" in caplog.text


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 7), (1, 500), (4, 16), (8, 3)])
def test_evaluation_has_each_row_once_and_equal_batches(
    index: Index, world: int, micro_batch: int
) -> None:
    rows = make_rows(index)
    seen, counts = [], set()
    for rank in range(world):
        loader = EvaluationLoader(
            rows, micro_batch=micro_batch, max_samples=None, rank=rank, world_size=world
        )
        batches = list(loader)
        counts.add((len(batches), len(loader)))
        assert all(batch["inputs"].shape == (micro_batch, 16) for batch in batches)
        for batch in batches:
            seen += batch["targets"][batch["targets"] != IGNORED].tolist()
    expected = [
        token
        for first, length in zip(*_chunks(), strict=True)
        for token in range(first + 1, first + (length - 1) // 16 * 16 + 1)
    ]
    assert sorted(seen) == expected
    assert len(counts) == 1
    assert len(set(counts.pop())) == 1


def test_evaluation_expects_blocks_before_it_reads_them() -> None:
    source, told = Numbers([3, 0, 40, 25, 7] * 40), []
    source.expect = lambda blocks: told.append(blocks.tolist())
    loader = EvaluationLoader(source, micro_batch=100, max_samples=None, rank=1, world_size=2)
    batches = iter(loader)
    assert not told
    numbers = [number for batch in batches for number in batch if number >= 0]
    assert numbers == list(range(1, 3000, 2))
    assert sorted({*chain(*told)}) == [n for n, size in enumerate([3, 0, 40, 25, 7] * 40) if size]


def test_limited_evaluation_spreads_over_the_split(index: Index) -> None:
    loader = EvaluationLoader(make_rows(index), micro_batch=4, max_samples=10, rank=0, world_size=1)
    firsts = [
        int(row[0]) - 1 for batch in loader for row in batch["targets"] if (row != IGNORED).all()
    ]
    assert len(firsts) == 10 == len(set(firsts))
    assert firsts == sorted(firsts)
    assert firsts[0] == 0
    assert firsts[-1] > 0.8 * sum(map(sum, LENGTHS))


def _chunks() -> tuple[list[int], list[int]]:
    lengths = [*chain(*LENGTHS)]
    return [sum(lengths[:number]) for number in range(len(lengths))], lengths


def test_repeated_first_batch_is_all_there_is(index):
    (first, *others) = list(make_loader(index, repeat_first_batch=True))
    assert others
    assert all(torch.equal(first["inputs"], other["inputs"]) for other in others)
    (_, second, *_) = list(make_loader(index))
    assert not torch.equal(first["inputs"], second["inputs"])
