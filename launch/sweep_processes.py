"""Jobs of a sweep as processes of this machine, some at a time, its GPUs divided among them."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from launch.ranks import die_with_parent, python_path
from launch.run_directory import RunDirectory
from launch.runtime import DONE, PREEMPTED
from launch.signals import noticing_signals
from launch.sweep_record import Job, Sweep, read_objective

POLL_S = 0.1
PROGRAM = ("-P", "-m", "launch.train")  # -P: the working folder may not shadow our packages
FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
"""Variables of whoever started this process; a job would take itself for a rank by them."""


@dataclass(frozen=True)
class Running:
    """A job that is running."""

    job: Job
    process: subprocess.Popen[bytes]
    devices: list[str]


def run_here(
    sweep: Sweep, jobs: list[tuple[Job, DictConfig]], flags: list[str], at_once: int
) -> None:
    """Run jobs, each in processes of its own, and note in the sweep how they end.

    A signal to stop is passed on to those that run; Ctrl-C after it kills them.

    Args:
        sweep: Its record.
        jobs: With their configurations.
        flags: Of the command line, for Hydra.
        at_once: How many may run at a time.

    Raises:
        StoppedError: There was such a signal; all jobs have ended.
        ValueError: More jobs at once than there are devices for.
    """
    devices = visible_devices(jobs[0][1])
    for job, config in jobs:
        _check_room(job, config, at_once, devices)
    waiting, running, told = list(jobs), list[Running](), 0
    with noticing_signals() as signals:
        try:
            while running or (waiting and not signals):
                while waiting and len(running) < at_once and not signals:
                    running.append(_start(sweep, *waiting.pop(0), flags, at_once, devices))
                time.sleep(POLL_S)
                for _ in signals[told:]:
                    _pass_on(signal.SIGKILL if told else signal.SIGTERM, running)
                    told += 1
                for each in [each for each in running if each.process.poll() is not None]:
                    running.remove(each)
                    devices += each.devices
                    note_end(sweep, each.job, each.process.returncode)
        finally:  # an error of ours
            _pass_on(signal.SIGKILL, running)


def visible_devices(config: DictConfig) -> list[str]:
    """CUDA devices of this process as CUDA_VISIBLE_DEVICES names them; none where jobs use none."""
    if config.trainer.accelerator not in ("auto", "gpu", "cuda"):
        return []
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [each.strip() for each in named.split(",") if each.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _check_room(job: Job, config: DictConfig, at_once: int, devices: list[str]) -> None:
    needed = at_once * config.trainer.devices
    if devices and needed > len(devices):
        raise ValueError(
            f"sweep.jobs={at_once} -> with trainer.devices={config.trainer.devices} of {job.run} "
            f"they need {needed} devices, and {len(devices)} are visible -> at most sweep.jobs="
            f"{len(devices) // config.trainer.devices}"
        )


def _start(
    sweep: Sweep,
    job: Job,
    config: DictConfig,
    flags: list[str],
    at_once: int,
    free_devices: list[str],
) -> Running:
    devices = [free_devices.pop(0) for _ in range(config.trainer.devices) if free_devices]
    status = RunDirectory(Path(job.directory)).status
    sweep.note(job, "running", reason="", slurm_job=None, began=time.time(), status_before=status)
    # In an allocation a job that stops would have all of it started again, the others' too.
    own = ["hydra.mode=RUN", *job.overrides, "cluster.requeue=false"]
    command = [sys.executable, *PROGRAM, *flags, *own]
    with sweep.log(job).open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(at_once * config.trainer.devices, devices),
            # Ctrl-C in a terminal comes to this process alone, which passes it on once.
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    return Running(job, process, devices)


def _environment(num_processes: int, devices: list[str]) -> dict[str, str]:
    inherited = {key: os.environ[key] for key in os.environ if not key.startswith(FOREIGN)}
    threads = str(max(1, (os.cpu_count() or 1) // num_processes))
    chosen = {"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {}
    shared = {"PYTHONPATH": python_path(), "PYTHONUNBUFFERED": "1"}
    return {"OMP_NUM_THREADS": threads} | inherited | shared | chosen


def _pass_on(number: signal.Signals, running: list[Running]) -> None:
    for each in running:
        each.process.send_signal(number)


def note_end(sweep: Sweep, job: Job, code: int, ended: str = "") -> None:
    """Note how a job has ended.

    Args:
        sweep: The record.
        job: Has been running.
        code: Its exit code.
        ended: What else is known of its end, where it could not say so itself.
    """
    seconds = job.seconds + time.time() - job.began
    if code == DONE:
        note_done(sweep, job, seconds)
    elif code in (PREEMPTED, -signal.SIGTERM):  # the latter before it could handle signals
        sweep.note(job, "preempted", seconds=seconds, reason="")
    else:
        reason = _reason(sweep, job, code, ended)
        sweep.note(job, "failed", seconds=seconds, reason=reason, objective=None)


def note_done(sweep: Sweep, job: Job, seconds: float) -> None:
    """Note that a job is finished, with its objective."""
    run = RunDirectory(Path(job.directory))
    try:
        objective = read_objective(run, sweep.objective)
    except ValueError as error:
        sweep.note(job, "failed", seconds=seconds, reason=str(error), objective=None)
        return
    steps = run.summary["step"]
    sweep.note(job, "done", seconds=seconds, reason="", objective=objective, steps=steps)


def _reason(sweep: Sweep, job: Job, code: int, ended: str) -> str:
    status, log = RunDirectory(Path(job.directory)).status, sweep.log(job)
    if status != job.status_before and status.get("state") == "failed":
        return status["reason"]
    output = log.read_text(errors="replace").strip() if log.exists() else ""
    if "error: " in output:
        said = output.rpartition("\nerror: ")[2].removeprefix("error: ")
        return " ".join(said.split())
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return ended or (output.splitlines() or ["no output"])[-1]
