"""Several ranks on gloo: the same losses as one, and the same resume. Each start costs seconds."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.errors import InstantiationException
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

import launch.train
from launch import ranks, runtime
from launch.run_directory import RunDirectory
from trainers.metrics import read_metrics

# torch's elastic agent leaves the log files of its ranks to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)

# SGD: Adam turns gradients that are zero but for rounding into steps of full size.
SGD = [
    "module.schedule.name=constant",
    "module.schedule.final_lr_fraction=null",
    "module.network.dropout=0.0",
    "module.optimizer.name=sgd",
    "module.optimizer.lr=0.05",
]
TWO_RANKS = ["strategy=ddp", "trainer.devices=2"]


def losses(run):
    rows = read_metrics(run.path / "metrics.jsonl")
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def assert_same_losses(one, other):
    assert one.keys() == other.keys()
    assert [one[step] for step in one] == pytest.approx([other[step] for step in one], abs=1e-5)


@pytest.fixture(autouse=True)
def _collect_now():
    yield
    gc.collect()


@pytest.fixture
def one_rank(small_run, train):
    """The run that any number of ranks must repeat."""
    return train(*small_run, *SGD, "run.name=one")


def test_two_ranks_train_as_one(small_run, train, one_rank, capfd):
    two = train(*small_run, *SGD, *TWO_RANKS, "run.name=two")
    assert_same_losses(losses(one_rank), losses(two))
    assert two.summary["val/loss"] == pytest.approx(one_rank.summary["val/loss"], abs=1e-5)
    assert (
        "run                     two: done" in capfd.readouterr().out
    )  # rank 0 shares the terminal
    perturbed = train(*small_run, *SGD, "run.name=perturbed", "datamodule.seed=2")
    with pytest.raises(AssertionError):  # the same rows in another order are told apart
        assert_same_losses(losses(one_rank), losses(perturbed))


@pytest.mark.slow
def test_torchrun_continues_what_one_rank_began(small_run, train, one_rank, command, tmp_path):
    began = train(*small_run, *SGD, "run.name=moved", "max_steps=10")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    overrides = [*small_run, *SGD, *TWO_RANKS, "run.name=moved", "resume.extend=true"]
    done = subprocess.run(
        [*torchrun, *command("train", *overrides)[1:]], capture_output=True, text=True
    )
    assert done.returncode == runtime.DONE, done.stdout + done.stderr
    moved = RunDirectory(began.path)
    assert_same_losses(losses(one_rank), losses(moved))
    rows = read_metrics(moved.path / "metrics.jsonl")
    assert [row["step"] for row in rows if "val/loss" in row] == [8, 10, 16, 20]
    again = subprocess.run(
        [*torchrun, *command("train", *overrides)[1:]], capture_output=True, text=True
    )
    assert again.returncode == runtime.DONE, again.stdout + again.stderr
    assert "moved: done" in again.stdout


CALLBACKS = """
from lightning.pytorch import Callback

class FailOnRankOne(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 1 and batch_idx == 3:
            raise RuntimeError("the second rank has had enough")
"""


@pytest.fixture
def own_callback(tmp_path, monkeypatch):
    """A folder with callbacks of the user's; gives the override that adds one."""
    (tmp_path / "own.py").write_text(CALLBACKS)
    monkeypatch.chdir(tmp_path)
    return lambda name: f"+trainer.callbacks.own={{_target_: own.{name}}}"


def test_rank_that_fails_alone_is_the_reason(small_run, train, own_callback, capfd):
    failing = own_callback("FailOnRankOne")
    run = train(*small_run, *TWO_RANKS, failing, code=runtime.FAILED)
    assert run.status["state"] == "failed"
    assert "rank 1 " in run.status["reason"]
    assert "the second rank has had enough" in run.status["reason"]
    assert "the second rank has had enough" in capfd.readouterr().err


@pytest.mark.parametrize("ranks", [["strategy=single"], TWO_RANKS], ids=["one rank", "two ranks"])
def test_run_that_cannot_start_says_why_in_its_status(small_run, compose, capfd, ranks):
    config = compose("train", [*small_run, *ranks, "module.schedule.warmup_samples=1000"])
    with contextlib.suppress(InstantiationException):  # in this process; ranks print it
        assert launch.train.train(config) == runtime.FAILED
    status = RunDirectory(Path(config.runs_dir, config.run.name)).status
    assert status["state"] == "failed"
    assert status["reason"].startswith("module.schedule: warm-up of 1000 samples")


def test_ranks_refuse_a_datamodule_before_they_train(small_run, train, capfd):
    run = train(*small_run, *TWO_RANKS, "datamodule.tail=keep", code=runtime.FAILED)
    message = "datamodule.tail=keep -> unknown -> choose one of drop, carry"
    assert run.status["reason"].startswith(message)
    assert f"error: {message}" in capfd.readouterr().err
    assert not (run.path / "metrics.jsonl").exists()


@pytest.mark.slow  # a loss of one rank alone is in test_failures.py, every day
def test_failing_rank_ends_the_run_and_says_why(small_run, train, capfd):
    overrides = ["module.optimizer.name=sgd", "module.optimizer.lr=1e30", "run.name=failed"]
    clip = "module.optimizer.gradient_clip=null"
    run = train(*small_run, *overrides, clip, *TWO_RANKS, code=runtime.FAILED)
    assert run.status["state"] == "failed"
    assert "the run diverged" in run.status["reason"]
    assert "error: trainer.guard.nonfinite=stop -> the loss on ranks " in capfd.readouterr().err


def test_signal_before_there_are_ranks_is_the_agents():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SignalException) as stopped, ranks._agent_signals():
        signal.raise_signal(signal.SIGTERM)  # on another exception it would close the rendezvous
    assert stopped.value.sigval == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("before", "state", "owns_run", "code", "left"),
    [
        ("done", "starting", True, runtime.PREEMPTED, "preempted"),
        ("done", "running", True, runtime.FAILED, "failed"),
        ("running", "done", True, runtime.DONE, "done"),
        ("running", "running", False, runtime.PREEMPTED, "running"),  # other nodes go on
        ("running", "failed", False, runtime.FAILED, "failed"),
        ("done", None, False, runtime.PREEMPTED, "done"),  # of an earlier launch
    ],
)
def test_signal_to_a_command_is_told_of_its_own_run_only(
    tmp_path, monkeypatch, before, state, owns_run, code, left
):
    monkeypatch.setattr(ranks, "LATE_S", 0.0)
    run = RunDirectory(tmp_path)
    run.write_status(before, "as it was")
    status = run.status
    if state is not None:
        run.write_status(state, "as it is")
    assert ranks._code_after_signal(run, status, "SIGTERM", owns_run) == code
    assert run.status["state"] == left


@pytest.mark.parametrize("owns_run", [True, False])
@pytest.mark.parametrize(
    ("facts", "exitcode", "code"),
    [
        ({"state": "done"}, -9, runtime.DONE),
        ({"state": "preempted", "asks_requeue": True}, -11, runtime.PREEMPTED),
        ({"state": "preempted"}, -9, runtime.FAILED),  # rank 0 alone, since the other was killed
        ({"state": "running"}, -9, runtime.FAILED),
        ({"state": "done"}, 1, runtime.FAILED),  # it has said what is still wrong
        (None, -9, runtime.FAILED),  # done, but that was an earlier launch
    ],
)
def test_rank_killed_when_all_was_saved_is_no_failure(
    tmp_path, monkeypatch, facts, exitcode, code, owns_run
):
    run = RunDirectory(tmp_path)
    run.write_status("done", "an earlier launch")

    def launch(*config):
        def end(*command):
            if facts:
                run.write_status(**facts)
            failure = SimpleNamespace(exitcode=exitcode, timestamp=0)
            raise ChildFailedError("rank", {1: failure})

        return end

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", launch)
    monkeypatch.setattr(ChildFailedError, "format_msg", lambda error: "")
    command = ["-P", "-m", "launch.rank" if owns_run else "launch.train"]
    given = ranks._run_agent(run, command, {}, min_nodes=1, max_nodes=1, nproc_per_node=2)
    assert given == (code if owns_run else runtime.FAILED)
    assert (run.status["state"] == "failed") == (given == runtime.FAILED)


def test_rank_whose_agent_is_gone_does_not_begin(tmp_path):
    rank = [sys.executable, "-m", "launch.rank", str(tmp_path / "none")]
    environment = {**os.environ, ranks.AGENT: "1"}
    ended = subprocess.run(rank, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (1, "")
    own = subprocess.run(
        rank, env=environment | {ranks.AGENT: str(os.getpid())}, capture_output=True, text=True
    )
    assert "config.yaml" in own.stderr  # it begins, and there is no run
