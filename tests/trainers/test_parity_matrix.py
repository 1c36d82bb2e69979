"""What `test_parity.py` shows of some cells, of many: too long for every day.

Left to `python -m benchmarks.parity`, which has every combination: low precision without
accumulation and with a few blocks recomputed, pairs in fp16, and other GANs recomputed.
"""

import sys
from dataclasses import replace

import pytest

from benchmarks import parity
from benchmarks.cells import STRATEGIES, Cell, run_cells
from benchmarks.gan_cells import GANS
from benchmarks.parity import judge, with_references

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
OPTIONS = {
    "modules": ["gpt", "two_networks"],
    "strategies": list(STRATEGIES),
    "precisions": ["fp32"],
    "recompute": ["none"],
    "micro": [2],
}
# In low precision every cell takes three runs.
MATRIX = [
    *parity.matrix(
        OPTIONS | {"recompute": ["none", "full", "selective", "every_2"], "micro": [None, 2]}
    ),
    *parity.matrix(
        OPTIONS | {"precisions": ["bf16", "fp16"], "recompute": ["none", "full", "selective"]}
    ),
    *parity.matrix(
        OPTIONS | {"modules": ["encoder_decoder", "lstm"], "precisions": ["fp32", "bf16"]}
    ),
    *parity.matrix(OPTIONS | {"modules": list(GANS)}),
    *parity.matrix(OPTIONS | {"modules": ["gan", "gan_wasserstein"], "recompute": ["full"]}),
]
# What the matrix of the command does not have.
MORE = [
    *(Cell("gan_relativistic", name, "bf16") for name in ("zero1", "fsdp")),
    Cell("gan", "ddp", "fp16"),
    Cell("gan", "zero3", "fp16", micro=2),
    Cell("gan_relativistic", "zero3", stop_at=5, begun="fsdp"),
    *(Cell("given", name, micro=2) for name in ("ddp", "zero2", "fsdp")),
    Cell("two_networks", "ddp", "fp16", stop_at=5, begun="zero2"),
    Cell("two_networks", "zero3", "fp16", stop_at=5, begun="fsdp"),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Every run, on ranks that are started once."""
    folder = tmp_path_factory.mktemp("parity")
    ones, runs = with_references([*MATRIX, *MORE])
    return run_cells(ones, folder, 1, "cpu") | run_cells(runs, folder, 2, "cpu")


@pytest.mark.parametrize("cell", [*MATRIX, *MORE], ids=lambda cell: cell.name)
def test_two_ranks_train_as_one(cell, outcomes):
    assert outcomes[cell].error is None
    is_equal, found = judge(cell, outcomes)
    assert is_equal, found


@pytest.mark.parametrize("is_wrong", [False, True])
def test_command_counts_cells_that_differ(is_wrong, outcomes, monkeypatch, capsys):
    found = dict(outcomes)
    if is_wrong:
        cell = Cell("lstm", "zero2", micro=2)
        found[cell] = replace(found[cell], losses=found[cell].losses + 1)
    options = ["modules=encoder_decoder,lstm", "precisions=fp32", "recompute=none", "micro=2"]
    monkeypatch.setattr(sys, "argv", ["parity", *options])
    monkeypatch.setattr(parity, "run_cells", lambda cells, *options: {c: found[c] for c in cells})
    with pytest.raises(SystemExit) as ended:
        parity.main()
    assert ended.value.code == is_wrong
    assert f"{is_wrong:d} of 12 cells differ" in capsys.readouterr().out
