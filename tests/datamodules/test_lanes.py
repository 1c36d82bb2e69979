"""What each rank reads: whole lanes in training, its share of an evaluation, without the others."""

from typing import Any

import pytest
import torch.distributed

from datamodules.loader import EvaluationLoader
from tests.datamodules.lives import PADDING, Case, Life, Numbers, make_loader, run


def read_by_rank(case: Case, world: int, micro_batch: int = 1) -> list[set[int]]:
    """Blocks that each rank reads in an epoch."""
    read = []
    for rank in range(world):
        source = Numbers(case.blocks)
        loader = make_loader(case, Life(world, micro_batch, 0), rank, source)
        loader._batches.last = case.samples_per_epoch // (world * micro_batch)
        for _ in loader._batches:
            pass
        read.append(source.blocks_read)
    return read


@pytest.mark.parametrize("tail", ["drop", "carry"])
def test_block_is_read_by_about_one_rank_where_ranks_divide_lanes(
    tail: str, caplog: pytest.LogCaptureFixture
) -> None:
    case = Case([40] * 100, batch_samples=16, window_mb=0.3, tail=tail, seed=2)
    for world in (1, 2, 4, 8, 16):
        reads = sum(map(len, read_by_rank(case, world)))
        # A lane begins and ends within a block, which is then read for its neighbour too.
        assert 100 <= reads <= 101 + 16
    assert not caplog.records


def test_blocks_are_read_by_several_ranks_where_ranks_do_not_divide_lanes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    case = Case([40] * 100, batch_samples=192, window_mb=0.3, tail="drop", seed=2)  # 64 lanes
    assert sum(map(len, read_by_rank(case, 3, 64))) > 250
    (warning,) = caplog.records  # of rank 0 alone
    assert "64 lanes, not a multiple of 3 ranks" in warning.getMessage()
    prime = Case([40] * 100, batch_samples=67, window_mb=0.3, tail="drop", seed=2)  # one lane
    read_by_rank(prime, 1, 67)
    assert len(caplog.records) == 1  # never at one rank


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8, 30])
@pytest.mark.parametrize("blocks", [[1], [3, 0, 1], [0, 50, 7]])
def test_evaluation_counts_each_sample_once(world: int, blocks: list[int]) -> None:
    for micro_batch in (1, 4, 100):
        seen, lengths = [], set()
        for rank in range(world):
            loader = EvaluationLoader(
                Numbers(blocks),
                micro_batch=micro_batch,
                max_samples=None,
                rank=rank,
                world_size=world,
            )
            batches = list(loader)
            lengths |= {len(batches), len(loader)}
            assert all(len(batch) == micro_batch for batch in batches)
            seen += [sample for batch in batches for sample in batch if sample != PADDING]
        assert sorted(seen) == list(range(sum(blocks)))
        assert len(lengths) == 1  # no rank waits for another at the end


def test_batches_need_no_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **settings: Any) -> None:
        raise AssertionError("a collective in the data path")

    module = torch.distributed.distributed_c10d
    names = [
        n for n in module.__all__ if callable(f := getattr(module, n)) and not isinstance(f, type)
    ]
    for name in names:
        monkeypatch.setattr(module, name, refuse)
        monkeypatch.setattr(torch.distributed, name, refuse, raising=False)
    assert {"barrier", "all_reduce", "broadcast", "all_gather_object"} <= set(names)
    case = Case([9, 0, 50], batch_samples=12, window_mb=0.05, tail="pad_mask", seed=3)
    assert len(run(case, [Life(3, 2, 0, 5), Life(2, 6, 0)])) == case.max_samples
    for rank in range(3):
        settings = {"micro_batch": 2, "max_samples": None, "rank": rank, "world_size": 3}
        assert len(list(EvaluationLoader(Numbers([3, 1]), **settings))) == 1
