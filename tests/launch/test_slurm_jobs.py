"""Following a job and asking for its next start, with stand-ins for Slurm's commands."""

import subprocess
from pathlib import Path

import pytest

from launch import runtime, slurm_jobs
from launch.run_directory import RunDirectory, StoppedError
from launch.submission import submit


@pytest.mark.parametrize(
    ("written", "ends", "code"),
    [
        ("done", "COMPLETED", runtime.DONE),
        ("preempted", "FAILED", runtime.PREEMPTED),
        ("failed", "FAILED", runtime.FAILED),
        ("running", "NODE_FAIL", runtime.FAILED),
        (None, "CANCELLED", runtime.FAILED),
    ],
)
def test_waiting_shows_states_and_output_and_gives_the_runs_code(
    stand_in, compose_job, monkeypatch, capsys, written, ends, code
):
    config = compose_job("cluster.wait=true")
    run = RunDirectory(Path(config.runs_dir, "small"))
    run.path.mkdir(parents=True)
    run.write_status("done", "by a launch before")
    states = iter(["PENDING", "RUNNING", "RUNNING", ends])

    def look_up(job_id):
        state = next(states)
        if state == "RUNNING":
            with (run.path / "logs/slurm/12_0_log.out").open("a") as log:
                log.write("a line\n")
        if state == ends and written:
            run.write_status(written, "as the run says")
        return slurm_jobs.Job("small", state, "None", "node1")

    monkeypatch.setattr(slurm_jobs, "look_up", look_up)
    monkeypatch.setattr(slurm_jobs, "POLL_S", 0.0)
    assert submit(config) == code
    printed = capsys.readouterr()
    for state in ("PENDING", "RUNNING", ends):
        assert printed.out.count(f"job 12: {state} (node1)") == 1
    assert printed.out.count("a line\n") == 2
    assert (f"job 12 ended: {ends}" in printed.err) == (code == runtime.FAILED)


def test_controller_that_does_not_answer_in_time_is_one_that_is_not_there(monkeypatch):
    def run(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(slurm_jobs.subprocess, "run", run)
    with pytest.raises(ValueError, match=r"cluster=slurm -> scontrol: .* timed out .* -> see"):
        slurm_jobs.look_up("12")


def test_waiting_outlives_a_silent_controller(stand_in, tmp_path, monkeypatch, capsys):
    def sleep(seconds):
        stand_in.job("COMPLETED", "small")

    monkeypatch.setattr(slurm_jobs.time, "sleep", sleep)
    stand_in.fall_silent()
    job = slurm_jobs.follow("12", tmp_path / "no.log")
    assert job
    assert job.state == "COMPLETED"
    assert "scontrol: Unable to contact slurm controller" in capsys.readouterr().out


def test_job_that_slurm_does_not_know_is_none(stand_in):
    stand_in.forget()
    assert slurm_jobs.look_up("12") is None
    stand_in.never_start()
    assert slurm_jobs.look_up("12") is None
    stand_in.fall_silent()
    with pytest.raises(ValueError, match="Unable to contact slurm controller -> see whether"):
        slurm_jobs.look_up("12")


def test_who_stops_waiting_leaves_the_job_alone(stand_in, compose_job, monkeypatch, capsys):
    def look_up(job_id):
        raise StoppedError("SIGINT")

    monkeypatch.setattr(slurm_jobs, "look_up", look_up)
    assert submit(compose_job("cluster.wait=true")) == runtime.PREEMPTED
    assert "no longer waiting for job 12, which goes on" in capsys.readouterr().err
    assert "scancel" not in stand_in.calls


@pytest.mark.parametrize(
    ("variables", "job"),
    [
        ({"SLURM_JOB_ID": "12"}, "12"),
        (
            {"SLURM_JOB_ID": "14", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "1"},
            "12_1",
        ),
    ],
)
def test_requeue_asks_for_this_job_alone(stand_in, monkeypatch, capsys, variables, job):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    slurm_jobs.requeue()
    assert f"scontrol requeue {job}" in stand_in.calls
    assert capsys.readouterr().out == f"job {job}: asked to be started again\n"


def test_requeue_that_fails_is_told_of_and_changes_nothing(stand_in, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    stand_in.fall_silent()
    slurm_jobs.requeue()
    assert "requeue 12: Unable to contact slurm controller -> cont" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "")
    slurm_jobs.requeue()
    assert "No such file or directory: 'scontrol'" in capsys.readouterr().err


TAKEN = "2026-01-01T00:00:00"


@pytest.mark.parametrize(
    ("state", "asks", "preempted", "is_requeued"),
    [
        ("preempted", True, "None", True),
        ("preempted", False, TAKEN, True),
        ("preempted", False, "None", False),  # cancelled
        ("done", True, TAKEN, False),
        ("failed", True, TAKEN, False),
    ],
)
def test_job_is_started_again_where_its_run_is_to_go_on(
    stand_in, compose_job, monkeypatch, tmp_path, state, asks, preempted, is_requeued
):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    stand_in.job("RUNNING", "small", preempted)
    run = RunDirectory(tmp_path)
    with slurm_jobs.requeued(run, compose_job()):
        run.write_status(state, "as the run says", step=7, asks_requeue=asks)
    assert ("scontrol requeue 12" in stand_in.calls) == is_requeued


@pytest.mark.parametrize(("name", "is_requeued"), [("SIGUSR1", True), ("SIGTERM", False)])
def test_job_that_is_stopped_before_its_first_step_is_started_again(
    stand_in, compose_job, monkeypatch, tmp_path, name, is_requeued
):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    with (
        pytest.raises(StoppedError),
        slurm_jobs.requeued(RunDirectory(tmp_path), compose_job()),
    ):
        raise StoppedError(name)
    assert ("scontrol requeue 12" in stand_in.calls) == is_requeued


def test_job_that_never_comes_to_a_step_is_not_started_for_ever(
    stand_in, compose_job, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    run, config = RunDirectory(tmp_path), compose_job()
    for _ in range(slurm_jobs.MAX_IDLE_STARTS + 1):
        with slurm_jobs.requeued(run, config):  # as its ranks have left it
            run.write_status("preempted", "SIGUSR1 before the first step")
    assert stand_in.calls.count("scontrol requeue 12") == slurm_jobs.MAX_IDLE_STARTS
    assert "3 starts did not come to a step -> allow more time" in capsys.readouterr().err
    with slurm_jobs.requeued(run, config):
        run.write_status("preempted", "SIGUSR1", step=7, asks_requeue=True)
    assert stand_in.calls.count("scontrol requeue 12") == slurm_jobs.MAX_IDLE_STARTS + 1
    assert not (tmp_path / slurm_jobs.IDLE_STARTS).exists()


@pytest.mark.parametrize(
    ("variables", "overrides"),
    [
        ({}, []),
        ({"SLURM_JOB_ID": "12", "RANK": "1"}, []),
        ({"SLURM_JOB_ID": "12"}, ["cluster.requeue=false"]),
    ],
    ids=["no job", "another rank", "not wanted"],
)
def test_nobody_else_asks_for_another_start(
    stand_in, compose_job, monkeypatch, tmp_path, variables, overrides
):
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    run = RunDirectory(tmp_path)
    with slurm_jobs.requeued(run, compose_job(*overrides)):
        run.write_status("preempted", "SIGUSR1", step=7, asks_requeue=True)
    assert "requeue" not in stand_in.calls
