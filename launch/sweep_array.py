"""Jobs of a sweep as tasks of an array of Slurm's, and what has become of each.

How a job has ended is read in its run directory, which the nodes share with this machine; Slurm
says when.
"""

import json
import time
from contextlib import suppress
from pathlib import Path

from omegaconf import DictConfig

from launch import job_script, slurm_jobs, submission
from launch.meeting import wait_until
from launch.run_directory import RunDirectory
from launch.runtime import DONE, FAILED, PREEMPTED
from launch.signals import noticing_signals
from launch.sweep_processes import note_end
from launch.sweep_record import Job, Sweep

CODES = {"done": DONE, "preempted": PREEMPTED}
Jobs = list[tuple[Job, DictConfig]]


def run_as_array(sweep: Sweep, jobs: Jobs, at_once: int) -> None:
    """Submit jobs, unless they are in the queue already, and note in the sweep how they end.

    A signal to stop is passed on to those that run, which save, and takes the others out of the
    queue; Ctrl-C after it cancels all. If this process is killed, the jobs go on, and the same
    command again waits for them.

    Args:
        sweep: Its record.
        jobs: With their configurations.
        at_once: How many Slurm may run at a time.

    Raises:
        StoppedError: There was such a signal; all jobs have ended.
        ValueError: They cannot be submitted, or Slurm does not answer.
    """
    queue = _read_queue()
    waiting = [job for job, _ in jobs if job.slurm_job in queue]
    new = [
        (job, config)
        for job, config in jobs
        if job not in waiting and _is_sound(sweep, job, config)
    ]
    told = 0
    with noticing_signals() as signals:
        for group in _by_resources(new):
            if not signals:
                _submit(sweep, group, at_once)
                waiting += [job for job, _ in group]
        while waiting:
            time.sleep(slurm_jobs.POLL_S)
            try:
                queue = _read_queue()
            except ValueError:  # a controller that restarts
                continue
            for _ in signals[told:]:
                _cancel(waiting, queue, gently=not told)
                told += 1
            waiting = [job for job in waiting if not _has_ended(sweep, job, queue)]


def _is_sound(sweep: Sweep, job: Job, config: DictConfig) -> bool:
    try:
        submission.check_run(config)
    except ValueError as error:
        sweep.note(job, "failed", reason=" ".join(str(error).split()), objective=None)
        return False
    return True


def _by_resources(jobs: Jobs) -> list[Jobs]:
    """The tasks of an array all get the same; jobs that ask for other nodes are another array."""
    groups: dict[str, Jobs] = {}
    for job, config in jobs:
        asked = job_script.parameters(config) | {"job_name": None}
        groups.setdefault(json.dumps(asked, sort_keys=True, default=str), []).append((job, config))
    return list(groups.values())


def _submit(sweep: Sweep, jobs: Jobs, at_once: int) -> None:
    folder, configs = sweep.folder / "slurm", [config for _, config in jobs]
    for job, _ in jobs:
        job.status_before = RunDirectory(Path(job.directory)).status
    numbers = submission.submit_array(sweep.name, configs, folder, at_once)
    for (job, _), number in zip(jobs, numbers, strict=True):
        job.slurm_job, job.began = number, time.time()
        log = sweep.log(job)
        log.unlink(missing_ok=True)
        log.symlink_to((folder / f"{number}_0_log.out").resolve())
    sweep.write()
    array = numbers[0].partition("_")[0]
    print(f"sweep {sweep.name}: {len(jobs)} job(s) submitted as {array}", flush=True)


def _read_queue() -> dict[str, str]:
    """State of each job of this user's that is not over."""
    said = slurm_jobs.ask("squeue", "--me", "--noheader", "--array", "--format=%i %T")
    return dict(line.split() for line in said.splitlines())


def _cancel(jobs: list[Job], queue: dict[str, str], *, gently: bool) -> None:
    """Take jobs that wait out of the queue, then end those that run; gently by SIGTERM alone."""
    numbers = [str(job.slurm_job) for job in jobs]
    running = [number for number in numbers if queue.get(number) == "RUNNING"]
    if others := [number for number in numbers if number not in running]:
        slurm_jobs.cancel(*others)
    if running:
        slurm_jobs.cancel(*(["--signal=TERM"] if gently else []), *running)


def _has_ended(sweep: Sweep, job: Job, queue: dict[str, str]) -> bool:
    state = queue.get(str(job.slurm_job))
    if state == "RUNNING" and job.state != "running":
        sweep.note(job, "running", began=time.time(), reason="")
    if state is not None:
        return False
    try:
        slurm_job = slurm_jobs.look_up(str(job.slurm_job))
    except ValueError:  # as above
        return False
    if slurm_job and not slurm_job.is_over:  # between two starts
        return False
    run, how = RunDirectory(Path(job.directory)), slurm_job.state if slurm_job else ""
    if how in ("CANCELLED", "") and run.status == job.status_before:
        sweep.note(job, "waiting", reason="taken out of Slurm's queue")
        return True
    if how == "COMPLETED":
        with suppress(ValueError):  # a shared file system shows it late, if at all
            wait_until(lambda: run.status.get("state") == "done", "the end of the run")
    status = run.status
    if how != "COMPLETED" and status == job.status_before:  # of an earlier launch
        status = {}
    code = CODES.get(status.get("state", ""), FAILED)
    note_end(sweep, job, code, f"job {job.slurm_job}: {slurm_job or 'Slurm has forgotten it'}")
    return True
