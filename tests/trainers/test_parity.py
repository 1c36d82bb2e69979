"""Any strategy trains as one rank does. `python -m benchmarks.parity` runs all of the matrix."""

import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import parity
from benchmarks.cells import STRATEGIES, Cell, run_cells
from benchmarks.parity import judge, with_references

# A covering set: every strategy with each module, every mode of recomputation, with accumulation
# and without; all combinations are behind the slow mark.
EQUAL = [
    *(Cell("gpt", name, micro=None if name in ("zero1", "fsdp") else 2) for name in STRATEGIES),
    *(Cell("two_networks", name, micro=2) for name in STRATEGIES),
    Cell("two_networks", "zero3", recompute="selective"),
    Cell("gpt", "zero3", recompute="full"),
    Cell("gpt", "ddp", recompute="selective"),
    Cell("gpt", "zero2", recompute="selective", micro=2),
    Cell("gpt", "fsdp", recompute="every_2", micro=2),
    Cell("two_networks", "fsdp", recompute="full"),
    *(Cell("masked", name, micro=2) for name in ("ddp", "zero1", "zero3", "fsdp")),
    *(Cell("frozen", name, micro=2) for name in ("ddp", "zero1", "zero3", "fsdp")),
    *(Cell("gpt", name, "bf16", micro=2) for name in ("ddp", "zero1", "zero3", "fsdp")),
    Cell("two_networks", "zero2", "bf16"),
    *(Cell("two_networks", name, "bf16", parameters="low") for name in ("zero1", "zero3")),
    *(Cell("gpt", name, "fp16", micro=2) for name in ("ddp", "zero3")),
    *(Cell("two_networks", name, "fp16", micro=2) for name in ("zero2", "fsdp")),
]
# What must not pass, or the test above would show nothing.
DIFFERENT = [
    Cell("two_networks", "ddp", control="unfrozen"),
    Cell("two_networks", "zero1", control="two_backwards"),
    Cell("two_networks", "zero2", control="two_backwards"),
    Cell("gpt", "zero2", control="no_clipping"),
    Cell("masked", "ddp", control="per_rank_mean"),
    Cell("two_networks", "fsdp", control="no_reshard"),
]
# Continued at step 5, and in one go.
RESUMED = [
    *(Cell("gpt", name, "bf16", stop_at=5, optimizer="adamw") for name in STRATEGIES),
    *(Cell("two_networks", name, stop_at=5) for name in ("zero2", "zero3", "fsdp")),
    *(Cell("two_networks", name, "fp16", stop_at=5) for name in ("ddp", "zero1", "zero3")),
    *(Cell("frozen", name, "bf16", stop_at=5, parameters="low") for name in ("zero1", "zero3")),
]
# Continued under another strategy.
CHANGED = [
    Cell("gpt", "zero3", stop_at=5, begun="ddp"),
    Cell("gpt", "fsdp", stop_at=5, begun="zero1"),
    Cell("frozen", "fsdp", stop_at=5, begun="zero3"),
    Cell("two_networks", "zero2", stop_at=5, begun="fsdp"),
    Cell("two_networks", "ddp", "fp16", stop_at=5, begun="zero2"),
    Cell("two_networks", "zero3", "fp16", stop_at=5, begun="fsdp"),
]


def in_one_go(cell):
    return replace(cell, stop_at=None, begun=None)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Every run, on ranks that are started once."""
    folder = tmp_path_factory.mktemp("parity")
    ones, runs = with_references([*EQUAL, *CHANGED])
    cells = [*runs, *DIFFERENT, *RESUMED, *map(in_one_go, RESUMED)]
    found = run_cells(ones, folder, 1, "cpu")
    return found | run_cells(list(dict.fromkeys(cells)), folder, 2, "cpu")


@pytest.mark.parametrize("cell", [*EQUAL, *CHANGED], ids=lambda cell: cell.name)
def test_two_ranks_train_as_one(cell, outcomes):
    assert outcomes[cell].error is None
    is_equal, found = judge(cell, outcomes)
    assert is_equal, found


@pytest.mark.parametrize("cell", DIFFERENT, ids=lambda cell: cell.name)
def test_what_is_broken_is_seen(cell, outcomes):
    is_equal, found = judge(cell, outcomes)
    assert not is_equal, found


@pytest.mark.parametrize("cell", RESUMED, ids=lambda cell: cell.name)
def test_continued_run_ends_with_the_same_bits(cell, outcomes):
    whole, continued = outcomes[in_one_go(cell)], outcomes[cell]
    assert whole.error is None
    assert continued.error is None
    assert torch.equal(whole.losses, continued.losses)
    assert whole.weights.keys() == continued.weights.keys()
    assert all(torch.equal(whole.weights[name], continued.weights[name]) for name in whole.weights)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_whole_matrix(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["parity", "recompute=none,full,selective,every_2"])
    with pytest.raises(SystemExit) as ended:
        parity.main()
    print(capsys.readouterr().out)
    assert ended.value.code == 0
