"""Where ranks print, and the line by which every command says why it ended."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from launch import last_line as last_line_module
from launch import runtime
from launch.run_directory import RunDirectory, StoppedError

OWN = """
import os, sys, time
from pathlib import Path
from lightning.pytorch import Callback

class FailOnRankOne(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 1 and batch_idx == 3:
            print("printed by Python")
            os.write(2, b"printed by a library\\n")
            raise RuntimeError("had enough")

class Absent(Callback):
    def __init__(self):
        if os.environ["RANK"] == "1":
            time.sleep(1000)
"""


@pytest.fixture
def own_callback(tmp_path, monkeypatch):
    """A folder with callbacks of the user's; gives the override that adds one."""
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return lambda name: f"+trainer.callbacks.own={{_target_: own.{name}}}"


def last_line(output):
    lines = output.splitlines()
    said = [line for line in lines if line.startswith("run small: ") and "running" not in line]
    assert len(said) == 1, output
    return said[0]


def test_last_line_says_why_the_command_has_ended(small_run, command):
    few = [*small_run, "max_steps=2", "trainer.val_every_steps=2"]
    refused = [*few, "seed=2"]
    for overrides, code, line in (
        (few, runtime.DONE, "run small: done: trained 2 steps"),
        (refused, runtime.FAILED, "run small: failed: run.name=small -> "),
    ):
        done = subprocess.run(
            command("train", *overrides), stdout=-1, stderr=subprocess.STDOUT, text=True
        )
        assert done.returncode == code, done.stdout
        assert done.stdout.splitlines()[-1] == last_line(done.stdout)
        assert last_line(done.stdout).startswith(line)


@pytest.fixture
def said(compose, tmp_path, capsys):
    """What the last line is, given a status (or none) and how the command has ended."""
    config = compose("train", ["run.name=small", f"runs_dir={tmp_path}"])
    run = RunDirectory(tmp_path / "small")
    run.path.mkdir()

    def say(code, problem=None, *, began=0.0):
        last_line_module.say_end(runtime.Ending(config, began, code, problem))
        return capsys.readouterr().out

    return run, say


def test_reason_is_the_status_of_this_command_or_what_kept_it_from_having_one(said, monkeypatch):
    run, say = said
    problem = "seed -> differs\n  -> another run.name"
    told = "run small: failed: seed -> differs -> another run.name\n"
    assert say(runtime.FAILED, problem) == told
    run.write_status("starting")
    assert say(runtime.PREEMPTED, "stopped by SIGTERM") == (
        "run small: preempted: stopped by SIGTERM\n"
    )
    run.write_failure("rank 1 has had enough", 3)
    lost = "RuntimeError: connection closed by peer"
    assert say(runtime.FAILED, lost) == "run small: failed: rank 1 has had enough\n"
    assert say(runtime.FAILED, problem, began=time.time() + 1) == told  # that was before
    run.write_status("preempted", "SIGUSR1")
    assert say(runtime.DONE) == "run small: preempted: SIGUSR1\n"  # torchrun's code
    monkeypatch.setenv(runtime.LAUNCHED_AT, "0")  # who has started this rank says it
    assert say(runtime.DONE) == ""
    monkeypatch.delenv(runtime.LAUNCHED_AT)
    monkeypatch.setenv("RANK", "1")
    assert say(runtime.DONE) == ""


def test_command_that_submits_a_job_does_not_say_that_its_run_is_done(compose, tmp_path, capsys):
    config = compose("train", ["cluster=slurm", "run.name=small", f"runs_dir={tmp_path}"])
    last_line_module.say_end(runtime.Ending(config, 0.0, runtime.DONE, None))
    assert capsys.readouterr().out == ""
    last_line_module.say_end(runtime.Ending(config, 0.0, runtime.FAILED, "no such partition"))
    assert capsys.readouterr().out == "run small: failed: no such partition\n"


def test_signal_while_it_says_why_it_failed_changes_nothing():
    program = """
import os, signal
from launch import runtime

class Failure(Exception):
    def __str__(self):  # asked for when the traceback is printed
        for number in runtime.STOP_SIGNALS:
            os.kill(os.getpid(), number)
        return "had enough"

def fail(config):
    raise Failure

def say_end(ending):
    os.kill(os.getpid(), signal.SIGTERM)
    print("it says:", ending.code, ending.problem)

runtime.verb("train", say_end)(fail)()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "it says: 1 Failure: had enough\n", done.stderr
    assert done.returncode == runtime.FAILED


def test_first_request_to_stop_counts_and_none_after_the_end():
    runtime.stop_by_exception()
    with pytest.raises(StoppedError, match="SIGUSR1"):
        signal.raise_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGTERM)  # it is stopping
    with pytest.raises(StoppedError, match="SIGINT"):  # whoever presses Ctrl-C again means it
        signal.raise_signal(signal.SIGINT)
    runtime.stop_by_exception()
    runtime.hear_no_stops()
    signal.raise_signal(signal.SIGTERM)
    assert runtime.has_been_stopped()


def test_last_line_has_nobody_to_read_it(tmp_path):
    program = f"""
from pathlib import Path
from launch import last_line
from launch.run_directory import RunDirectory
last_line.say(RunDirectory(Path({str(tmp_path)!r})), "preempted", "SIGINT")
raise SystemExit(75)
"""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (runtime.PREEMPTED, b"")


def test_why_a_start_failed_is_written_at_its_step(tmp_path):
    run = RunDirectory(tmp_path)
    run.write_status("starting")
    with pytest.raises(NotImplementedError), run.noting_failed_start():
        raise NotImplementedError
    assert run.status["reason"] == "NotImplementedError"
    trainer = SimpleNamespace(global_step=500, is_global_zero=True, max_steps=1000)
    trainer.strategy = SimpleNamespace(checkpoint_io=SimpleNamespace(drops_optimizer=False))
    with pytest.raises(KeyError), run.noting_failed_start(), run.status_of(trainer):
        raise KeyError("lost")
    assert (run.status["step"], run.status["reason"]) == (500, "'lost'")
    for step, reason in ((7, "StoppedError: SIGINT"), (0, "SIGINT before the first step")):
        trainer.global_step = step
        with pytest.raises(StoppedError), run.noting_failed_start(), run.status_of(trainer):
            raise StoppedError("SIGINT")
        assert (run.status["state"], run.status["reason"]) == ("preempted", reason)
        assert run.status.get("step", 0) == step  # without, a job knows that it was idle


def test_rank_of_torchrun_prints_to_a_file_and_rank_0_says_why_it_failed(
    small_run, own_callback, command, tmp_path
):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    overrides = [*small_run, "strategy=ddp", own_callback("FailOnRankOne")]
    done = subprocess.run(
        [*torchrun, *command("train", *overrides)[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == runtime.FAILED
    run = RunDirectory(tmp_path / "runs" / "small")
    assert "rank 1 failed at step 4: RuntimeError: had enough" in last_line(done.stdout)
    assert "printed by" not in done.stdout
    (log,) = run.path.glob("logs/torchrun-*/rank*.log")
    assert log.name == "rank1.log"
    assert f"output of the other ranks: {log.parent}/rank<k>.log" in done.stdout
    printed = log.read_text()
    for text in ("printed by Python", "printed by a library", "RuntimeError: had enough"):
        assert text in printed


def test_rank_that_waits_for_one_that_does_not_come_hears_a_signal(
    small_run, own_callback, start, tmp_path
):
    process = start(*small_run, "strategy=ddp", "trainer.devices=2", own_callback("Absent"))
    run = RunDirectory(tmp_path / "runs" / "small")
    while run.status.get("state") != "running":
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    time.sleep(3)  # now rank 0 waits for rank 1 in C++
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == runtime.PREEMPTED, output
    assert run.status["state"] == "preempted"
    assert last_line(output).startswith("run small: preempted: SIGTERM before the first step")
