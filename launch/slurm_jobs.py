"""What Slurm knows of a job, and what it is asked to do with one."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from launch.cluster import is_first
from launch.run_directory import RunDirectory, StoppedError
from launch.runtime import launched_at
from trainers.durable_files import write_atomically

ENDS = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PREEMPTED", "REVOKED", "TIMEOUT",
}  # fmt: skip
"""States that a job stays in."""
AHEAD_OF_LIMIT = ("SIGUSR1", "SIGUSR2")
"""What Slurm is asked to send ahead of a job's time limit, by us and by submitit."""
IDLE_STARTS, MAX_IDLE_STARTS = "idle_starts", 3
"""File of a run that counts starts in a row which were stopped before a step; how many may be."""
POLL_S = 2.0
"""Between two looks at a job; a controller has many to answer."""
ANSWER_S = 60
"""A controller that is busy answers late."""


@dataclass(frozen=True)
class Job:
    """A job as the controller sees it.

    Attributes:
        name: The run's, of jobs that are ours.
        state: In Slurm's words: PENDING, RUNNING, COMPLETED, ...
        reason: Why it waits, or has failed; `None` where there is nothing to say.
        nodes: Where it is or was, as Slurm abbreviates it.
    """

    name: str
    state: str
    reason: str
    nodes: str

    @property
    def is_over(self) -> bool:
        """Whether it will not run any more."""
        return self.state in ENDS

    def __str__(self) -> str:
        about = self.reason if self.reason != "None" else self.nodes
        return f"{self.state} ({about})" if about else self.state


def look_up(job_id: str) -> Job | None:
    """Ask for a job.

    Returns:
        The job; None of one that Slurm has forgotten, some minutes after its end, or of a task of
        an array that was cancelled before its turn came.

    Raises:
        ValueError: The controller does not answer.
    """
    try:
        said = ask("scontrol", "show", "job", job_id).replace("(null)", "")
    except ValueError as error:
        # The second of a task that was cancelled before its array came to it.
        if re.search("Invalid job id|Job [0-9_]+ not found", str(error)):
            return None
        raise
    found = {
        key: re.search(pattern, said, re.MULTILINE)
        for key, pattern in {
            "name": r"\bJobName=(.*)$",
            "state": r"\bJobState=(\S+)",
            "reason": r"\bReason=(\S+)",
            "nodes": r"\bNodeList=(\S*)",
        }.items()
    }
    return Job(**{key: match[1] if match else "" for key, match in found.items()})


def ask(*command: str) -> str:
    """What one of Slurm's commands prints.

    Raises:
        ValueError: It refuses, does not end, or is not there.
    """
    try:
        done = _run(*command)
        if done.returncode == 0:
            return done.stdout
        problem = (done.stderr or done.stdout).strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    raise ValueError(f"cluster=slurm -> {command[0]}: {problem} -> see whether `sinfo` works here")


def follow(job_id: str, log: Path) -> Job | None:
    """Show a job's states and the output of its rank 0 as they come, until it is over.

    Args:
        job_id: The job.
        log: Where its rank 0 writes.

    Returns:
        The job at its end; None if Slurm has forgotten it meanwhile.
    """
    shown, told = 0, ""
    while True:
        try:
            job = look_up(job_id)
            news = f"job {job_id}: {job or 'forgotten by Slurm'}"
            is_over = job is None or job.is_over
        except ValueError as error:  # a controller that restarts; the job goes on without it
            job, news, is_over = None, f"job {job_id}: {error}", False
        shown = _show_from(log, shown)
        if news != told:
            print(news, flush=True)
        told = news
        if is_over:
            return job
        time.sleep(POLL_S)


@contextmanager
def requeued(run: RunDirectory, config: DictConfig) -> Iterator[None]:
    """Ask for another start of this job, where the run was stopped in it and is to go on.

    It is after a stop ahead of the time limit (SIGUSR1, SIGUSR2), by a budget or a cloud's notice.
    After SIGTERM only if Slurm itself takes the place away: who cancels a job sends it, too. A
    preempted job that ends within its time of grace is not requeued by Slurm.
    """
    try:
        yield
    except StoppedError as reason:
        requeue_idle(run, str(reason), config)
        raise
    status = run.status
    if status.get("state") != "preempted" or status["time"] < launched_at():
        return
    if "step" not in status:  # the ranks that this process has started did not come to train
        requeue_idle(run, status["reason"].split()[0], config)
        return
    (run.path / IDLE_STARTS).unlink(missing_ok=True)
    _requeue_if(status.get("asks_requeue", False), config)


def requeue_idle(run: RunDirectory, signal_name: str, config: DictConfig) -> None:
    """Ask for another start after one that was stopped before its first step, a few times only.

    A job that takes longer to start than it may take would start for ever.
    """
    if "SLURM_JOB_ID" not in os.environ or not is_first():
        return
    counter = run.path / IDLE_STARTS
    count = 1 + (int(counter.read_text()) if counter.exists() else 0)
    if signal_name in AHEAD_OF_LIMIT and count > MAX_IDLE_STARTS:
        counter.unlink()
        message = f"{MAX_IDLE_STARTS} starts did not come to a step -> allow more time"
        print(f"note: cluster.requeue=true -> {message}", file=sys.stderr, flush=True)
        return
    if run.path.exists():
        write_atomically(counter, f"{count}\n")
    _requeue_if(signal_name in AHEAD_OF_LIMIT, config)


def _requeue_if(is_asked: bool, config: DictConfig) -> None:
    may_ask = "SLURM_JOB_ID" in os.environ and config.cluster.requeue and is_first()
    if may_ask and (is_asked or _is_preempted(os.environ["SLURM_JOB_ID"])):
        requeue()


def _is_preempted(job_id: str) -> bool:
    """Whether a job's place is wanted by one that goes first, and it has a while to leave."""
    try:
        said = _run("scontrol", "show", "job", "--oneliner", job_id).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    since = re.search(r"\bPreemptTime=(\S+)", said)
    return "JobState=RUNNING " in said and since is not None and since[1] != "None"


def requeue() -> None:
    """Ask Slurm to start this job again, as rank 0 of one that has saved.

    It waits in the queue like any other and continues with the same command. A refusal is told
    of and changes nothing else: the run can be continued by hand.
    """
    job_id = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:  # by its number alone the whole array may be meant
        job_id = "{SLURM_ARRAY_JOB_ID}_{SLURM_ARRAY_TASK_ID}".format(**os.environ)
    try:
        done = _run("scontrol", "requeue", job_id)
        refusal = done.stderr.strip() if done.returncode else None
    except (OSError, subprocess.TimeoutExpired) as error:  # in a container without Slurm's commands
        refusal = str(error)
    if refusal is None:
        print(f"job {job_id}: asked to be started again", flush=True)
        return
    message = f"scontrol requeue {job_id}: {refusal} -> continue by the same command"
    print(f"note: cluster.requeue=true -> {message}", file=sys.stderr, flush=True)


def cancel(*arguments: str) -> None:
    """Let `scancel` end jobs; it prints what it has to say, of one that has just ended say."""
    try:
        subprocess.run(["scancel", *arguments], check=False, timeout=ANSWER_S)
    except subprocess.TimeoutExpired:
        late = f"scancel {' '.join(arguments)}: no answer for {ANSWER_S} s"
        print(f"note: {late} -> give that command once more", file=sys.stderr, flush=True)


def partitions() -> list[str]:
    """Names of the partitions there are."""
    return sorted(set(_run("sinfo", "--noheader", "--format=%R").stdout.split()))


def _show_from(log: Path, position: int) -> int:
    """Print what a file has from a position on; give the position after it."""
    if not log.exists():
        return position
    with log.open("rb") as file:
        file.seek(position)
        more = file.read()
    sys.stdout.write(more.decode(errors="replace"))
    sys.stdout.flush()
    return position + len(more)


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S)
