"""Jobs of a sweep in Slurm's queue, by a stand-in for Slurm."""

import os
import signal
from pathlib import Path

import pytest

from launch import slurm_jobs, submission, sweep_array
from launch.run_directory import RunDirectory, StoppedError
from launch.sweep_array import run_as_array
from launch.sweep_record import Job, Sweep

read_queue = sweep_array._read_queue


class Slurm:
    """A queue whose jobs go on by a state each time it is looked at; `lives` says through which."""

    def __init__(self, lives):
        self.lives, self.jobs, self.submitted, self.cancelled = lives, {}, [], []

    def submit_array(self, name, configs, folder, at_once):
        number = 10 + len(self.submitted)
        self.submitted.append(([config.run.name for config in configs], at_once))
        jobs = {f"{number}_{place}": config for place, config in enumerate(configs)}
        for job, config in jobs.items():
            self.jobs[job] = list(self.lives[config.run.name])
        return list(jobs)

    def read_queue(self):
        queue = {}
        for number, states in self.jobs.items():
            if not states:
                continue
            state = states.pop(0)
            if said := state() if callable(state) else state:
                queue[number] = said
        return queue

    def cancel(self, jobs, queue, *, gently):
        self.cancelled.append((gently, [job.run for job in jobs]))


@pytest.fixture
def array(tmp_path, monkeypatch, compose):
    """Run jobs with such lives: `array({"a": [...]})` gives the sweep and Slurm."""
    monkeypatch.setattr(slurm_jobs, "POLL_S", 0.001)
    monkeypatch.setattr(
        slurm_jobs, "look_up", lambda job: slurm_jobs.Job("s", "FAILED", "None", "n1")
    )
    sweep = Sweep(tmp_path / "sweeps" / "s", objective="val/loss")
    sweep.folder.mkdir(parents=True)
    slurm = Slurm({})
    monkeypatch.setattr(submission, "submit_array", slurm.submit_array)
    monkeypatch.setattr(submission, "check_run", lambda config: None)
    monkeypatch.setattr(sweep_array, "_read_queue", slurm.read_queue)
    monkeypatch.setattr(sweep_array, "_cancel", slurm.cancel)

    def run(lives, overrides=(), at_once=2, **known):
        slurm.lives = lives
        jobs = []
        for place, name in enumerate(lives):
            job = Job(name, {}, [], directory=str(tmp_path / name), slurm_job=known.get(name))
            Path(job.directory).mkdir(exist_ok=True)
            sweep.jobs[name] = job
            own = overrides[place] if overrides else ()
            given = ["experiment=gpt_char_cpu", "cluster=slurm", f"run.name={name}", *own]
            jobs.append((job, compose("train", given)))
        run_as_array(sweep, jobs, at_once)

    return sweep, slurm, run


def ends(tmp_path, name, state, reason="", objective=None):
    """What a run leaves at its end."""

    def end():
        run = RunDirectory(tmp_path / name)
        if objective is not None:
            run.write_summary({"step": 1, "val/loss": objective})
        run.write_status(state, reason)

    return end


def test_array_tells_how_each_job_ends(array, tmp_path):
    sweep, slurm, run = array
    run(
        {
            "a": ["PENDING", "RUNNING", ends(tmp_path, "a", "done", objective=2.0)],
            "b": ["RUNNING", ends(tmp_path, "b", "failed", reason="made to fail")],
            "c": ["RUNNING", "PENDING", "RUNNING", ends(tmp_path, "c", "done", objective=3.0)],
            "d": ["RUNNING"],
            "e": ["RUNNING", ends(tmp_path, "e", "preempted")],
        },
        at_once=3,
    )
    assert slurm.submitted == [(["a", "b", "c", "d", "e"], 3)]
    states = {job.run: (job.state, job.objective) for job in sweep.jobs.values()}
    assert states == {
        "a": ("done", 2.0),
        "b": ("failed", None),
        "c": ("done", 3.0),
        "d": ("failed", None),
        "e": ("preempted", None),
    }
    assert sweep.jobs["b"].reason == "made to fail"
    assert sweep.jobs["d"].reason == "job 10_3: FAILED (n1)"  # killed: its run could not say why


def test_jobs_that_ask_for_other_nodes_are_another_array(array, tmp_path):
    _, slurm, run = array
    lives = {name: [ends(tmp_path, name, "done", objective=1.0)] for name in ("a", "b", "c")}
    run(lives, [["trainer.devices=1"], ["trainer.devices=2"], ["trainer.devices=1"]])
    assert slurm.submitted == [(["a", "c"], 2), (["b"], 2)]


def test_job_that_is_in_the_queue_already_is_not_submitted_again(array, tmp_path):
    sweep, slurm, run = array
    slurm.jobs["7_0"] = ["RUNNING", "RUNNING", ends(tmp_path, "a", "done", objective=1.0)]
    run({"a": [], "b": [ends(tmp_path, "b", "done", objective=1.0)]}, a="7_0")
    assert slurm.submitted == [(["b"], 2)]
    assert [job.state for job in sweep.jobs.values()] == ["done", "done"]


def test_job_that_cannot_be_is_not_submitted(array, tmp_path, monkeypatch):
    sweep, slurm, run = array

    def check(config):
        if config.run.name == "b":
            raise ValueError("key=value -> no -> do not")

    monkeypatch.setattr(submission, "check_run", check)
    run({"a": [ends(tmp_path, "a", "done", objective=1.0)], "b": []})
    assert slurm.submitted == [(["a"], 2)]
    assert sweep.jobs["b"].reason == "key=value -> no -> do not"


def test_status_of_an_earlier_launch_is_not_that_of_a_job(array, tmp_path):
    sweep, _, run = array
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    ends(tmp_path, "a", "done", objective=2.0)()
    ends(tmp_path, "b", "preempted")()
    run({"a": ["RUNNING"], "b": ["PENDING", "RUNNING"]})  # both die before they say anything
    assert [job.state for job in sweep.jobs.values()] == ["failed", "failed"]
    assert sweep.jobs["b"].reason == "job 10_1: FAILED (n1)"


def test_completed_job_is_done_whatever_was_before(array, tmp_path, monkeypatch):
    sweep, _, run = array
    (tmp_path / "a").mkdir()
    ends(tmp_path, "a", "done", objective=2.0)()
    completed = slurm_jobs.Job("s", "COMPLETED", "None", "n1")
    monkeypatch.setattr(slurm_jobs, "look_up", lambda job: completed)
    run({"a": ["RUNNING"]})
    assert (sweep.jobs["a"].state, sweep.jobs["a"].objective) == ("done", 2.0)


@pytest.mark.parametrize(
    ("squeue", "said"),
    [(None, "No such file"), ("#!/bin/sh\necho 'no controller' >&2; exit 1\n", "no controller")],
)
def test_slurm_that_does_not_answer_is_said_before_anything_is_submitted(
    array, tmp_path, monkeypatch, squeue, said
):
    _, slurm, run = array
    if squeue:
        (tmp_path / "squeue").write_text(squeue)
        (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sweep_array, "_read_queue", read_queue)
    with pytest.raises(ValueError, match=f"cluster=slurm -> squeue: .*{said}.* -> see whether"):
        run({"a": []})
    assert not slurm.submitted


def test_signal_while_jobs_are_submitted_cancels_those_that_are(array, tmp_path, monkeypatch):
    sweep, slurm, run = array
    submit_array = slurm.submit_array

    def submit(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        return submit_array(*given)

    monkeypatch.setattr(submission, "submit_array", submit)
    cancelled = slurm_jobs.Job("s", "CANCELLED", "", "")
    monkeypatch.setattr(slurm_jobs, "look_up", lambda job: cancelled)
    with pytest.raises(StoppedError, match="SIGTERM"):
        run({"a": ["PENDING"], "b": []}, [["trainer.devices=1"], ["trainer.devices=2"]])
    assert slurm.submitted == [(["a"], 2)]
    assert slurm.cancelled == [(True, ["a"])]
    assert Sweep.read(sweep.folder).jobs["a"].slurm_job == "10_0"


@pytest.mark.parametrize(("second", "cancelled"), [("SIGINT", [True, False]), ("SIGTERM", [True])])
def test_second_ctrl_c_cancels_all_and_other_signals_nothing(array, tmp_path, second, cancelled):
    _, slurm, run = array

    def stop(number):
        os.kill(os.getpid(), number)
        return "RUNNING"

    lives = [lambda: stop(signal.SIGTERM), lambda: stop(signal.Signals[second]), "RUNNING"]
    with pytest.raises(StoppedError, match="SIGTERM"):
        run({"a": [*lives, ends(tmp_path, "a", "preempted")]})
    assert [gently for gently, _ in slurm.cancelled] == cancelled


@pytest.mark.parametrize("known", [True, False], ids=["as cancelled", "not at all"])
def test_signal_cancels_gently_first(array, tmp_path, monkeypatch, known):
    sweep, slurm, run = array

    def interrupt():
        os.kill(os.getpid(), signal.SIGTERM)
        return "RUNNING"

    cancelled = slurm_jobs.Job("s", "CANCELLED", "", "") if known else None
    monkeypatch.setattr(slurm_jobs, "look_up", lambda job: cancelled)
    saved = ends(tmp_path, "a", "preempted")
    with pytest.raises(StoppedError, match="SIGTERM"):
        run({"a": ["RUNNING", interrupt, "RUNNING", "RUNNING", saved], "b": ["PENDING"] * 4})
    assert slurm.cancelled == [(True, ["a", "b"])]
    assert [job.state for job in sweep.jobs.values()] == ["preempted", "waiting"]
