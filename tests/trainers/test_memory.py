"""What lives on a rank is what `trainers.strategies.memory` says, kind by kind, to a tenth."""

import pytest
import torch

from benchmarks.cells import STRATEGIES
from benchmarks.memory import all_cells, formula, live_storages, measure
from trainers.strategies.memory import bytes_per_parameter

CELLS = all_cells()
TOLERANCE = 0.1
# Strategy -> one whose formula must not fit it.
OTHER = {
    "ddp": "zero1",
    "zero1": "zero3",
    "zero2": "zero3",
    "zero3": "fsdp",
    "zero3_offload": "zero3",
    "fsdp": "ddp",
}
TWO = pytest.param(2, marks=pytest.mark.slow)
FOUR = pytest.param(4, marks=[pytest.mark.slow, pytest.mark.timeout(900)])


@pytest.fixture(scope="module", params=[TWO, FOUR], ids=lambda ranks: f"{ranks}_ranks")
def ranks(request):
    return request.param


@pytest.fixture(scope="module")
def measured(ranks, tmp_path_factory):
    """Bytes per parameter of every cell, on ranks that are started once."""
    return measure(CELLS, tmp_path_factory.mktemp("memory"), ranks)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell.strategy}-{cell.parameters}")
def test_live_bytes_of_each_kind_are_those_of_the_formula(cell, measured, ranks):
    assert measured[cell] == pytest.approx(formula(cell, ranks), rel=TOLERANCE)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell.strategy}-{cell.parameters}")
def test_live_bytes_are_not_those_of_another_strategy(cell, measured, ranks):
    other = bytes_per_parameter(OTHER[cell.strategy], ranks, low=cell.parameters == "low").total
    assert sum(measured[cell].values()) != pytest.approx(other, rel=TOLERANCE)


def test_every_strategy_is_measured():
    assert {cell.strategy for cell in CELLS} == set(STRATEGIES) == set(OTHER)


def test_live_storages_count_each_once_with_gradients():
    before = live_storages()
    parameter = torch.nn.Parameter(torch.zeros(1000))
    view = parameter.detach()[:10]
    parameter.sum().mul(2).backward()  # a gradient that nothing but the parameter holds
    new = {address: size for address, size in live_storages().items() if address not in before}
    assert sorted(new.values()) == [4000, 4000]
    assert view.data_ptr() in new
