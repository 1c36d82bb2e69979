"""On a CUDA device: the same commands, the same losses, the same resume."""

import pytest

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


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizers_run_on_the_device(small_run, train, optimizer):
    rate = "module.optimizer.lr=0.01"
    run = train(*small_run, f"module.optimizer.name={optimizer}", rate, "trainer.accelerator=cuda")
    assert run.summary["val/loss"] < 3.3


def test_one_rank_under_ddp_uses_nccl(small_run, train):
    run = train(*small_run, "strategy=ddp", "trainer.accelerator=cuda")
    assert run.summary["step"] == 20
