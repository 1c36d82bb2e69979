"""On a CUDA device: the same commands, the same losses, the same resume."""

from dataclasses import replace

import pytest

from benchmarks.cells import STRATEGIES, Cell, run_cells
from benchmarks.parity import judge, with_references
from trainers.metrics import read_metrics

pytestmark = pytest.mark.gpu


def first_losses(run):
    rows = read_metrics(run.path / "metrics.jsonl")
    return [row["train/loss"] for row in rows if "train/loss" in row][:5]


def test_cuda_trains_as_the_cpu_does(small_run, train):
    plain = [*small_run, "module.network.dropout=0.0", "precision=fp32"]
    on_cpu = train(*plain, "run.name=cpu")
    on_cuda = train(*plain, "run.name=cuda", "trainer.accelerator=cuda")
    assert first_losses(on_cuda) == pytest.approx(first_losses(on_cpu), abs=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains(small_run, train, precision):
    run = train(*small_run, f"precision={precision}", "trainer.accelerator=cuda")
    assert run.summary["val/loss"] < 3.3
    last = [row for row in read_metrics(run.path / "metrics.jsonl") if "train/loss" in row][-1]
    assert last["perf/peak_memory_mib"] > 0


def test_auto_uses_the_device_and_resumes_on_it(small_run, train):
    options = ["trainer.accelerator=auto", "precision=auto"]
    began = train(*small_run, *options, "max_steps=10")
    assert began.config.precision in ("bf16", "fp16")
    run = train(*small_run, *options, "resume.extend=true")
    assert run.summary["step"] == 20


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adamw_rms", "adafactor"])
def test_optimizers_run_on_the_device(small_run, train, optimizer):
    rate = "module.optimizer.lr=0.01"
    run = train(*small_run, f"module.optimizer.name={optimizer}", rate, "trainer.accelerator=cuda")
    assert run.summary["val/loss"] < 3.3


MATRIX = [
    Cell(module, strategy, precision, micro=2)
    for module in ("gpt", "two_networks")
    for strategy in STRATEGIES
    for precision in ("bf16", "fp16")
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """The matrix on one device, each strategy beside plain training there."""
    ones, runs = with_references(MATRIX)
    cells = list(dict.fromkeys([*ones, *runs, *(replace(c, stop_at=5) for c in MATRIX)]))
    return run_cells(cells, tmp_path_factory.mktemp("matrix"), 1, "cuda")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("cell", MATRIX, ids=lambda cell: cell.name)
def test_every_strategy_trains_as_plain_training_does(cell, outcomes):
    assert outcomes[cell].error is None
    is_equal, found = judge(cell, outcomes)
    assert is_equal, found


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("cell", MATRIX, ids=lambda cell: cell.name)
def test_every_strategy_continues_on_the_device(cell, outcomes):
    whole, continued = outcomes[cell], outcomes[replace(cell, stop_at=5)]
    assert continued.error is None
    assert len(continued.losses) == len(whole.losses)
    assert continued.losses.tolist() == pytest.approx(whole.losses.tolist(), rel=1e-3)


def test_one_rank_under_ddp_uses_nccl(small_run, train):
    run = train(*small_run, "strategy=ddp", "trainer.accelerator=cuda")
    assert run.summary["step"] == 20
