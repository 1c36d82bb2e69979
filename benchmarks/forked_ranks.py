"""Ranks as forks of one process that has imported what they need.

Importing torch, Lightning and DeepSpeed takes longer than a small run, and a fork has them at once,
in a world of any size. For CPUs: CUDA does not survive a fork. The process that forks must have no
threads and no process group.
"""

import gc
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence

from lightning.pytorch.utilities import rank_zero_only

from benchmarks.cells import find_port, rank_environment
from launch.ranks import die_with_parent
from trainers.strategies.deepspeed_settings import import_deepspeed

IMPORTS = (
    "launch.train",
    "modules.gan",
    "modules.gan_features",
    "modules.gpt",
    "torch.utils.serialization.config",
    "trainers.build",
    "trainers.strategies.fsdp",
    "trainers.strategies.replicated",
    "trainers.strategies.zero",
)
Work = Callable[[], int | None]


def import_all() -> None:
    """Import what a run imports only where it needs it; collections need not look through it."""
    for name in IMPORTS:
        importlib.import_module(name)
    import_deepspeed("cpu")
    gc.collect()
    gc.freeze()
    assert threading.active_count() == 1


def fork_ranks(work: Work, num_ranks: int) -> list[int]:
    """Start the processes of a new world; each does `work` and ends with the code that it gives.

    Returns:
        Their process ids, by rank.
    """
    port = find_port()
    return [fork(work, rank_environment(rank, num_ranks, port)) for rank in range(num_ranks)]


def fork(work: Work, environment: dict[str, str]) -> int:
    """Start one process, which ends with this one; 1 is its code after an exception."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        die_with_parent()
        os.environ |= environment
        # Lightning has taken it when it was imported.
        setattr(rank_zero_only, "rank", int(environment.get("RANK", 0)))  # noqa: B010
        code = work() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_for(pids: Sequence[int]) -> list[int]:
    """Wait for processes until all have ended, or one not well: the others are killed then.

    Returns:
        Their codes, negative after a signal.
    """
    codes: dict[int, int] = {}
    try:
        while len(codes) < len(pids) and not any(codes.values()):
            pid, status = os.wait()
            if pid in pids:
                codes[pid] = os.waitstatus_to_exitcode(status)
    finally:
        left = [pid for pid in pids if pid not in codes]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        codes |= {pid: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in left}
    return [codes[pid] for pid in pids]
