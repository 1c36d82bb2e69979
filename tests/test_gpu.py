"""On a CUDA device: the same commands, the same losses, the same resume."""

import subprocess
from dataclasses import replace

import pytest
import torch

from benchmarks import gan_throughput
from benchmarks.cells import STRATEGIES, Cell, run_cells
from benchmarks.parity import judge, with_references
from launch.run_directory import RunDirectory
from trainers.checkpoint import load_weights
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


@pytest.fixture
def digits(gan_run):
    """A GAN with all that a device may do in its own way, but for the step's batch."""
    network = "module.network={norm: batch, dropout: 0.3, width_factor: null}"
    lazy = "module.penalty={r1: 0.5, every_steps: 2}"
    other = ["module.optimizer.lr=2e-4", "batch_images=16", "trainer.val_every_steps=100"]
    return [*gan_run, network, lazy, *other, "module.augmentation.name=diffaugment"]


def gan_losses(run):
    rows = read_metrics(run.path / "metrics.jsonl")
    keys = ("train/discriminator_loss", "train/penalty", "train/generator_loss")
    return [row[key] for row in rows for key in keys if key in row]


def average_of(run):
    saved = load_weights(run.find_checkpoint("last"))
    return torch.cat([v.flatten().float() for k, v in saved.items() if k.startswith("ema.")])


def test_gan_on_cuda_trains_as_on_the_cpu(digits, train):
    independent = [*digits, "max_steps=6", "module.network.dropout=0.0"]  # drawn by the device
    on_cpu = train(*independent, "run.name=cpu")
    on_cuda = train(*independent, "run.name=cuda", "trainer.accelerator=cuda")
    assert gan_losses(on_cuda) == pytest.approx(gan_losses(on_cpu), rel=1e-2, abs=1e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_gan_trains_and_resumes_on_the_device(digits, train, precision):
    options = [*digits, f"precision={precision}", "trainer.accelerator=cuda"]
    whole = train(*options, "run.name=whole", "max_steps=8")
    train(*options, "run.name=parted", "max_steps=4")
    parted = train(*options, "run.name=parted", "max_steps=8", "resume.extend=true")
    assert len(gan_losses(whole)) == 8 + 4 + 8
    assert gan_losses(parted) == pytest.approx(gan_losses(whole), rel=1e-2, abs=1e-2)
    torch.testing.assert_close(average_of(parted), average_of(whole), rtol=1e-2, atol=1e-3)


def test_gan_on_two_devices_equals_one_with_statistics_of_both(digits, train, command, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device; test_gan_sync.py has its layers on two ranks")
    options = [*digits, "module.optimizer.name=sgd", "module.network.dropout=0.0", "max_steps=6"]
    options.append("trainer.accelerator=cuda")
    one = train(*options, "run.name=one")
    ranks = [*options, "strategy=ddp", "trainer.devices=2"]
    for name, is_equal in {"synced": True, "per_rank": False}.items():
        own = [f"run.name={name}", f"module.batch_norm={name}"]
        subprocess.run(command("train", *ranks, *own), check=True)
        run = RunDirectory(tmp_path / "runs" / name)
        close = pytest.approx(gan_losses(one), rel=1e-3, abs=1e-3)
        assert (gan_losses(run) == close) == is_equal


def test_sides_of_the_gan_benchmark_run_on_the_device(tmp_path):
    options = {"preset": "dcgan", "precision": "bf16", "accelerator": "cuda"}
    taken = gan_throughput.compete(tmp_path, **options, turns=2, rounds=2)
    assert all((turns > 0).all() for turns in taken.values())
