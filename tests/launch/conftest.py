"""Runs in processes of their own, to be killed or signalled."""

import os
import signal
import subprocess
import time

import pytest

from launch import object_store, runtime
from tests.launch.failing_store import FailingStore
from tests.launch.slurm_stand_in import SlurmStandIn
from trainers.metrics import read_metrics


@pytest.fixture(autouse=True)
def _handlers():
    """Give back the signals that verbs, ranks and torch's agent take in this process."""
    numbers = [signal.SIGHUP, signal.SIGQUIT, *runtime.STOP_SIGNALS]
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def failing_store(monkeypatch):
    """An empty store at `failing://`, and no waits between attempts."""
    monkeypatch.setattr(object_store, "FIRST_WAIT_S", 0.0)
    FailingStore.clear()
    yield FailingStore
    FailingStore.clear()


@pytest.fixture
def start(command):
    """Start a run in a process of its own; `start.wait` waits for a step of it."""
    started = []

    def start_run(*overrides):
        process = subprocess.Popen(
            command("train", *overrides),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    start_run.wait = wait_for_step  # pyright: ignore[reportFunctionMemberAccess]
    yield start_run
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Slurm's commands, first on the path."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    return SlurmStandIn(tmp_path / "slurm", monkeypatch)


@pytest.fixture
def compose_job(compose, small_run):
    """Compose a run that is to be a job."""
    slurm = ["cluster=slurm", "strategy=ddp", "cluster.nodes=2", "trainer.devices=2"]
    return lambda *overrides: compose("train", [*small_run, *slurm, *overrides])


def wait_for_step(process, run_path, step):
    """Wait until the run has logged `step`, for as long as the test may take."""
    while not (rows := read_metrics(run_path / "metrics.jsonl")) or rows[-1]["step"] < step:
        assert process.poll() is None, "the run ended before it could be stopped"
        time.sleep(0.01)
