"""`cluster=slurm` on a real cluster: a job of two nodes trains as this process does."""

import json
import subprocess
import sys

import pytest

from launch import runtime
from launch.run_directory import RunDirectory
from tests.launch.test_ranks import SGD
from trainers.metrics import read_metrics

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

JOB = ["cluster=slurm", "cluster.nodes=2", "strategy=ddp", "cluster.wait=true", "run.name=job"]


@pytest.fixture
def submit(slurm, command, small_run, tmp_path):
    """Run the command that submits and waits; gives what it printed, and the run."""

    def submit_run(*overrides, code):
        done = subprocess.run(
            command("train", *small_run, *SGD, *JOB, *overrides),
            env=slurm.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done, RunDirectory(tmp_path / "runs" / "job")

    return submit_run


def losses(run):
    rows = read_metrics(run.path / "metrics.jsonl")
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def test_job_trains_as_one_process_does_and_the_command_waits(submit, slurm, small_run, train):
    here = train(*small_run, *SGD, "run.name=here")
    done, run = submit(code=runtime.DONE)
    assert len(losses(run)) == 20
    assert losses(run) == pytest.approx(losses(here), abs=1e-5)
    noted = json.loads((run.path / "job.json").read_text())
    facts = slurm.facts(noted["job"])
    assert (facts["JobState"], facts["NumNodes"], facts["Restarts"]) == ("COMPLETED", "2", "0")
    assert f"follow: tail -F {noted['log']}" in done.stdout
    assert f"job {noted['job']}: COMPLETED (node[1-2])" in done.stdout
    assert "job: done" in done.stdout  # the summary, which rank 0 prints
    again, _ = submit(code=runtime.DONE)
    assert "submitted" not in again.stdout


def test_run_that_fails_is_a_failed_job(submit, slurm):
    done, run = submit("corpus.path=nowhere", code=runtime.FAILED)
    assert "error: corpus.path=nowhere -> no such file or folder" in done.stdout
    job = json.loads((run.path / "job.json").read_text())["job"]
    assert (
        slurm.state(job) == "FAILED"
    )  # its code is the highest: of rank 0, or of one that it ended


def test_partition_that_does_not_exist_is_refused_with_those_that_do(submit):
    done, run = submit("cluster.partition=fast", code=runtime.FAILED)
    assert done.stderr.startswith("error: cluster.partition=fast -> sbatch: ")
    assert "-> use one of high, main" in done.stderr
    assert [path.name for path in run.path.rglob("*") if path.is_file()] == [".lock"]


def test_requeue_starts_one_job_of_an_array_again(slurm, tmp_path):
    script = tmp_path / "job.sh"
    script.write_text(
        "#!/bin/bash\n"
        '[ "$SLURM_ARRAY_TASK_ID$SLURM_RESTART_COUNT" = 1 ] || exit 0\n'
        f"srun {sys.executable} -c 'from launch.slurm_jobs import requeue; requeue()'\n"
        "exit 75\n"
    )
    array = slurm.submit(script, options=["--array=0-1", "--requeue"])
    for task, restarts in (("0", "0"), ("1", "1")):
        slurm.wait_for(f"{array}_{task}", "COMPLETED")
        assert slurm.facts(f"{array}_{task}")["Restarts"] == restarts
