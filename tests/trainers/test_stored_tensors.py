"""Runs of tensors: what each rank writes of what all have, and pieces read again."""

import random

import pytest
import torch

from trainers.stored_tensors import Run, Stored, deal, is_elementwise
from trainers.tensor_pieces import file_name, key_of, kind_of


def some_runs(draw, rank):
    """Of one rank: tensors that all have, of sizes drawn alike on all ranks, and own runs."""
    runs = {}
    for i in range(draw.randint(0, 40)):
        size = int(draw.paretovariate(0.6)) % 5000
        dtype = draw.choice([torch.float32, torch.float16, torch.int64])
        runs[f"copied.{i}"] = Run.whole(torch.zeros(size, dtype=dtype))
        if draw.random() < 0.3:
            runs[f"own.{i}"] = Run(torch.Size([40]), 10 * rank, torch.zeros(10))
    return runs


@pytest.mark.parametrize("seed", range(40))
def test_each_copied_tensor_is_written_by_one_rank_and_loads_are_even(seed):
    num_ranks = random.Random(seed).choice([1, 2, 3, 4, 7, 16])
    draws = [random.Random(seed) for _ in range(num_ranks)]
    given = [some_runs(draw, rank) for rank, draw in enumerate(draws)]
    shares = [deal(runs, rank, num_ranks) for rank, runs in enumerate(given)]
    loads = [0] * num_ranks
    largest = 0
    for name, run in given[0].items():
        assert all(share[name].shape == run.shape for share in shares)
        if name.startswith("own"):
            assert all(share[name] is runs[name] for share, runs in zip(shares, given, strict=True))
            continue
        counts = [share[name].values.numel() for share in shares]
        assert sorted(counts) == [0] * (num_ranks - 1) + [run.values.numel()]
        for rank, share in enumerate(shares):
            loads[rank] += share[name].values.nbytes
        largest = max(largest, run.values.nbytes)
    assert max(loads) - min(loads) <= largest  # none could be given away to make it more even


def test_the_largest_are_dealt_first():
    sizes = [1, 1, 2]
    runs = {str(i): Run.whole(torch.zeros(size)) for i, size in enumerate(sizes)}
    shares = [deal(runs, rank, 2) for rank in range(2)]
    assert [sum(run.values.numel() for run in share.values()) for share in shares] == [2, 2]


def test_run_says_where_it_is():
    run = Run(torch.Size([3, 4]), 5, torch.arange(4))
    assert run.stop == 9
    assert (run.without_values().start, run.without_values().stop) == (0, 0)
    whole = Run.whole(torch.zeros(()))
    assert (whole.shape, whole.values.shape, whole.stop) == (torch.Size([]), (1,), 1)


def test_stored_gives_runs_and_the_whole():
    tensor = torch.arange(12).view(3, 4)
    stored = Stored.of(tensor)
    assert torch.equal(stored.whole(), tensor)
    assert stored.run(5, 9).tolist() == [5, 6, 7, 8]
    assert Stored.of(torch.tensor(3)).whole().shape == ()
    assert Stored.of(torch.zeros(0, 3)).whole().shape == (0, 3)


def test_counts_of_steps_have_no_value_for_each_element():
    assert is_elementwise("exp_avg", torch.zeros(2, 3), torch.Size([2, 3]))
    assert not is_elementwise("row", torch.zeros(2, 1), torch.Size([2, 3]))
    assert not is_elementwise("step", torch.zeros(()), torch.Size([]))
    assert not is_elementwise("lr", 0.1, torch.Size([]))


def test_names_of_files_and_keys():
    assert file_name("weights", 0, 1) == "weights.safetensors"
    assert file_name("optimizer", 1, 4) == "optimizer-00002-of-00004.safetensors"
    assert kind_of("weights/a.b") == "weights"
    assert kind_of("optimizer.0/exp_avg/a.b") == "optimizer"
    assert key_of("weights/a.b", 0, 6, 6) == "a.b"
    assert key_of("optimizer.0/exp_avg/a.b", 2, 6, 6) == "optimizer.0/exp_avg/a.b[2:6]"
