"""Runs go on under any strategy on any number of ranks: `benchmarks.checkpoint_matrix`."""

import sys

import pytest

from benchmarks import checkpoint_matrix
from benchmarks.checkpoint_matrix import (
    LAUNCHES,
    changes,
    compare,
    controls,
    is_as_expected,
    train_runs,
)

pytestmark = pytest.mark.timeout(900)  # the first test waits for all runs, on a busy machine long
# Each strategy begins a run and continues one, on one rank and on two.
COVERING = [
    *changes(["gpt"], ["zero3@2"], ["single@1", "fsdp@2"]),
    *changes(["gpt"], ["fsdp@2"], ["zero1@1", "zero2@2"]),
    *changes(["gpt"], ["single@1"], ["zero3@2"]),
    *changes(["gan"], ["zero1@2"], ["ddp@1", "zero3@2"]),
    *changes(["gan"], ["ddp@1"], ["fsdp@2"]),
    *changes(["gan"], ["zero2@2"], ["fsdp@1", "ddp@2"]),
]
BROKEN = [control for module in ("gpt", "gan") for control in controls(module)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All of these runs, by forks of one process."""
    folder = tmp_path_factory.mktemp("matrix")
    train_runs([*COVERING, *BROKEN], folder)
    return folder


def test_all_strategies_are_on_both_sides():
    strategies = {launch.split("@")[0] for launch in LAUNCHES}
    assert {run.strategy for run in COVERING} == strategies
    assert {str(run.continues).split("@")[0] for run in COVERING} == strategies


@pytest.mark.parametrize("run", COVERING, ids=lambda run: run.name)
def test_run_goes_on_as_if_never_stopped(run, folder):
    found = compare(run, folder)
    assert found.is_none, found


@pytest.mark.parametrize("run", BROKEN, ids=lambda run: run.name)
def test_lost_state_differs_in_losses_and_late_data_in_samples(run, folder):
    found = compare(run, folder)
    assert not found.is_none
    assert is_as_expected(run, found), found


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    "options",
    [
        ["modules=gpt"],
        # Who saves does not know what a tensor is for: two ranks stand for all that begin.
        ["modules=gan", f"from={','.join(name for name in LAUNCHES if name.endswith('@2'))}"],
    ],
    ids=["gpt", "gan"],
)
def test_all_pairs(options, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["checkpoint_matrix", *options])
    with pytest.raises(SystemExit) as ended:
        checkpoint_matrix.main()
    print(capfd.readouterr().out)
    assert ended.value.code == 0
