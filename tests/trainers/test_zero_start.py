"""ZeRO-3 starts what no rank could hold: parameters whole one at a time, the rest in shards."""

import pytest
import torch

from benchmarks.cells import start_ranks
from tests.trainers.fsdp_modules import RANKS, TinyGPT, fit, token_batches
from tests.trainers.zero_start_ranks import CASES
from trainers.strategies.replicated import Single


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank found, in all cases; they are started once."""
    out = tmp_path_factory.mktemp("ranks")
    start_ranks("tests.trainers.zero_start_ranks", [str(out)], RANKS)
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def sizes():
    """Numbers in each parameter."""
    return [size.numel() for size in TinyGPT("modern_tiny")._sizes.values()]


@pytest.mark.parametrize("case", ["zero3", "zero3_low"])
def test_start_needs_shards_and_few_whole_parameters(case, found, sizes):
    # One whole parameter, and one that a thread of gloo may hold for a moment longer.
    # Under `low` they are drawn once more for masters, beside shards of parameters and gradients.
    bytes_of_shards = {"zero3": 4, "zero3_low": 2 + 4 + 2}[case] * sum(sizes) / RANKS
    for rank in found:
        most_alive, _ = rank[case]
        assert most_alive <= 1.05 * (bytes_of_shards + 2 * 4 * max(sizes))
        assert most_alive > 0.9 * bytes_of_shards  # or it was not measured


def test_whole_model_is_noticed(found, sizes):
    for rank in found:
        assert rank["zero2"][0] >= 4 * sum(sizes)


@pytest.mark.filterwarnings("ignore:.*no `val_dataloader`")
@pytest.mark.parametrize("case", CASES)
def test_start_is_that_of_one_rank(case, found):
    module, start = TinyGPT("modern_tiny"), {}
    module.on_train_start = lambda: start.update(
        {name: value.clone() for name, value in module.state_dict().items()}
    )
    fit(module, Single, steps=1, data=token_batches())
    _, gathered = found[0][case]
    assert gathered.keys() == start.keys()
    assert all(torch.equal(gathered[name], start[name]) for name in start)
    assert any(value.abs().max() > 0.1 for value in start.values())  # not all zeros
