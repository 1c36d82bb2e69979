"""A sweep as an array of a real Slurm cluster: interrupted, killed, repeated."""

import os
import re
import signal
import subprocess

import pytest

from launch.run_directory import RunDirectory
from tests.cluster.slurm_cluster import wait_until
from tests.launch.watched_sweep import WatchedSweep

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1800)]

LR = "module.optimizer.lr"
JOURNAL = "tests.cluster.journal.Journal"
RATES = ("0.001", "0.01", "1e+30", "0.003")  # the third diverges


@pytest.fixture
def sweep_folder(tmp_path):
    return tmp_path / "runs" / "sweeps" / "rates"


@pytest.fixture
def start_sweep(cluster, small_settings, command, tmp_path):
    """Start a sweep of four jobs of two nodes; the third fails in its ranks."""
    settings = [each for each in small_settings if not each.startswith("run.name")]
    # Else a job would end between two looks at the queue.
    slow = f"{{_target_: {JOURNAL}, folder: {tmp_path / 'journal'}, linger_s: 1.5, linger_from: 7}}"
    settings.append(f"+trainer.callbacks.journal={slow}")
    started = []

    def start():
        process = subprocess.Popen(
            command(
                "train", "-m", *settings, f"runs_dir={tmp_path / 'runs'}", "sweep.name=rates",
                "cluster=slurm", "cluster.nodes=2", "strategy=ddp", f"{LR}={','.join(RATES)}",
            ),
            env=cluster.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
    subprocess.run(["scancel", "--me"], env=cluster.environment, check=True)


def test_array_is_interrupted_and_left_and_finishes_what_is_missing(
    start_sweep, sweep_folder, cluster
):
    sweep = WatchedSweep(sweep_folder, LR, RATES)
    jobs, states, step_of = sweep.jobs, sweep.states, sweep.step_of

    def queue():
        command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
        return subprocess.check_output(command, env=cluster.environment, text=True).split()

    first = start_sweep()
    wait_until(lambda: bool(jobs()) and step_of(1) >= 6, "the second job")
    first.send_signal(signal.SIGINT)
    output, _ = first.communicate()
    assert first.returncode == 75, output
    assert states() == ["done", "preempted", "waiting", "waiting"]
    assert queue() == []

    second = start_sweep()
    wait_until(lambda: states()[1] == "done", "the second job")
    second.kill()
    second.wait()
    submitted = {job.slurm_job for job in jobs()[2:]}
    assert submitted >= set(queue())

    third = start_sweep()
    output, _ = third.communicate()
    assert third.returncode == 1, output
    assert states() == ["done", "done", "failed", "done"]
    assert queue() == []
    assert {job.slurm_job for job in jobs()[2:]} == submitted  # not a second time
    assert "3 of 4 jobs done, 1 failed" in output
    assert "finite" in jobs()[2].reason

    logs = [(sweep_folder / f"{job.run}.log").read_text() for job in jobs()]
    assert re.search(r"running: continues from step-\d+ \(saved by ddp on 2 rank", logs[1])
    for job in (jobs()[0], jobs()[1], jobs()[3]):
        assert (
            job.objective
            == RunDirectory(job.directory and sweep_folder.parent.parent / job.run).summary[
                "val/loss"
            ]
        )
    assert all(os.path.islink(sweep_folder / f"{job.run}.log") for job in jobs())
