"""The last line of a command that trains: `run <name>: <done|preempted|failed>: <reason>`."""

import os
import sys

from launch.cluster import is_first
from launch.run_directory import RunDirectory
from launch.run_home import directory_of
from launch.runtime import DONE, FAILED, LAUNCHED_AT, PREEMPTED, Ending
from trainers.rules import is_submission

STATES = {DONE: "done", PREEMPTED: "preempted", FAILED: "failed"}


def say_end(ending: Ending) -> None:
    """Say how a run has ended, by what is in its status, or why it did not come to have one."""
    if ending.problem is None and is_submission(ending.config):
        return  # the job says it
    run = directory_of(ending.config)
    state, reason = STATES[ending.code], ending.problem or ""
    status = run.status
    is_of_now = status.get("time", 0.0) >= ending.began
    # Where this command was refused or stopped early, its status is that of the run before.
    is_its_own = is_of_now or (ending.problem is None and status.get("state") == state)
    if status.get("state") in STATES.values() and is_its_own:
        state, reason = status["state"], status["reason"]
    say(run, state, reason)


def say(run: RunDirectory, state: str, reason: str) -> None:
    """Print the line, in the process that was started as the command, of several as rank 0."""
    if is_first() and LAUNCHED_AT not in os.environ:
        try:
            print(f"run {run.path.name}: {state}: {' '.join(reason.split())}", flush=True)
        except OSError:  # whoever read it is gone, by the same Ctrl-C say
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
