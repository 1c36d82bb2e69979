"""A sweep of real runs of two ranks: interrupted, killed, repeated."""

import re
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from launch.run_directory import RunDirectory
from tests.launch.watched_sweep import WatchedSweep

ROOT = Path(__file__).parents[2]
JOURNAL = "tests.cluster.journal.Journal"
LR = "module.optimizer.lr"
RATES = ("0.001", "0.01", "1e+30", "0.003")  # the third diverges


def processes_of(folder):
    """All processes that have to do with a folder by their command lines."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        is_ours = any(str(folder) in part for part in process.info["cmdline"] or ())
        if is_ours and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def wait_until(condition, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.fixture
def sweep_command(small_settings, command, tmp_path, monkeypatch):
    """A sweep of four jobs of two ranks, the third of which fails in its ranks."""
    settings = [each for each in small_settings if not each.startswith("run.name")]
    # Else a job might end between two looks at it.
    slow = f"{{_target_: {JOURNAL}, folder: {tmp_path / 'journal'}, linger_s: 1, linger_from: 7}}"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return command(
        "train", "-m", *settings, f"runs_dir={tmp_path / 'runs'}", "sweep.name=rates",
        "strategy=ddp", "trainer.devices=2", "module.network.dropout=0", f"{LR}={','.join(RATES)}",
        f"+trainer.callbacks.journal={slow}",
    )  # fmt: skip


@pytest.fixture
def start_sweep(sweep_command):
    """Start the sweep in a process of its own."""
    started = []

    def start():
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(sweep_command, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_sweep_is_interrupted_and_killed_and_finishes_what_is_missing(
    start_sweep, tmp_path, small_settings, train
):
    sweep = WatchedSweep(tmp_path / "runs/sweeps/rates", LR, RATES)
    jobs, states, step_of = sweep.jobs, sweep.states, sweep.step_of

    def has_saved(number):
        return Path(jobs()[number].directory, "checkpoints", "last").exists()

    first = start_sweep()
    wait_until(lambda: jobs() and states()[0] == "done" and step_of(1) >= 6)
    assert len(processes_of(tmp_path)) >= 2  # the sweep, and the job; its ranks name the run
    first.send_signal(2)
    output, _ = first.communicate()
    assert first.returncode == 75, output
    assert states() == ["done", "preempted", "waiting", "waiting"]
    assert not processes_of(tmp_path)

    second = start_sweep()
    wait_until(lambda: states()[2] == "failed" and has_saved(3))
    second.kill()
    second.wait()
    wait_until(lambda: not processes_of(tmp_path), seconds=30)
    assert states() == ["done", "done", "failed", "running"]

    third = start_sweep()
    output, _ = third.communicate()
    assert third.returncode == 1, output
    assert states() == ["done", "done", "failed", "done"]
    assert not processes_of(tmp_path)
    assert "3 of 4 jobs done, 1 failed" in output
    assert "finite" in jobs()[2].reason

    logs = [(tmp_path / f"runs/sweeps/rates/{job.run}.log").read_text() for job in jobs()]
    starts = [re.findall(r"running: (begins|continues from step-\d+)", log) for log in logs]
    assert starts[0] == ["begins"]
    assert [len(each) for each in starts] == [1, 2, 2, 2]
    assert "continues" in starts[1][1]
    assert "continues" in starts[3][1]
    alone = train(
        *small_settings, f"runs_dir={tmp_path / 'alone'}", "module.network.dropout=0", f"{LR}=0.01"
    )
    for job in (jobs()[0], jobs()[1], jobs()[3]):
        assert job.objective == RunDirectory(tmp_path / "runs" / job.run).summary["val/loss"]
    assert jobs()[1].objective == pytest.approx(alone.summary["val/loss"], rel=1e-4)
    assert jobs()[1].objective < jobs()[0].objective  # pyright: ignore[reportOperatorIssue]
