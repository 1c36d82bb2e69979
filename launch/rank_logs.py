"""What ranks that somebody else has started print: rank 0 on the console, each other to a file."""

import os
import sys
import time
from io import TextIOWrapper
from typing import cast

from launch.cluster import host, is_first, is_rank, starter
from launch.run_directory import RunDirectory


def redirect(run: RunDirectory) -> None:
    """Send what this rank and its libraries print from now on to `logs/<launch>/rank<k>.log`.

    By file descriptors, so that what C++ and NCCL print is there, too. Rank 0 keeps the console and
    says where the others' output is; why one of them has failed, it says with its last line.
    """
    if not is_rank() or os.environ["WORLD_SIZE"] == "1":
        return
    folder = run.path / "logs" / launch_name()
    if is_first():
        print(f"output of the other ranks: {folder}/rank<k>.log", flush=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank{os.environ['RANK']}.log"
    sys.stdout.flush()
    sys.stderr.flush()
    with path.open("ab") as file:
        began = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"-- {began} process {os.getpid()} on {host()}\n".encode())
        file.flush()
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    # Not in blocks, as into other files: a rank that is killed has said so much.
    cast(TextIOWrapper, sys.stdout).reconfigure(line_buffering=True)


def launch_name() -> str:
    """What all ranks of a launch call it without asking each other; it may be an earlier's, too."""
    said = os.environ
    if starter() == "srun":
        restarts = said.get("SLURM_RESTART_COUNT", "0")
        return f"slurm-{said['SLURM_JOB_ID']}.{said['SLURM_STEP_ID']}-{restarts}"
    return f"{starter()}-{said.get('TORCHELASTIC_RUN_ID', said['MASTER_PORT'])}"
