"""A rank that waits in a library for others, before training, and does not hear a request to stop.

Python handles a signal when the main thread is back in Python. While ranks connect it is in C++,
and if one of them is gone it stays there: for as long as a collective may take.
"""

import os
import signal
import threading
import time

from omegaconf import DictConfig

from launch import last_line, slurm_jobs
from launch.cluster import code_for_starter, is_first
from launch.run_directory import RunDirectory
from launch.runtime import LAUNCHED_AT, PREEMPTED, STOP_SIGNALS, has_been_stopped

GRACE_S = 10.0
"""Seconds for a rank to end by itself after a signal, less than any scheduler gives it."""

UNWINDING_S = 60.0
"""Seconds for a rank that has heard it to come to its end."""


def end_if_deaf(run: RunDirectory, config: DictConfig) -> None:
    """From now on end this process when it has not ended `GRACE_S` after a signal to stop.

    A thread reads the signals' numbers from where Python's own handler, which does not need the
    main thread, writes them. `trainers.callbacks.preemption` stops that at the first step: then
    requests are heard at the end of a step, however long it takes.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    threading.Thread(target=_listen, args=[run, config, reader], daemon=True).start()


def _listen(run: RunDirectory, config: DictConfig, reader: int) -> None:
    while (number := os.read(reader, 1)[0]) not in STOP_SIGNALS:
        pass
    time.sleep(GRACE_S)
    if has_been_stopped():  # it was heard: the process says and asks what is to be, unless it hangs
        time.sleep(UNWINDING_S)
        os._exit(code_for_starter(PREEMPTED))
    try:
        _speak_for_it(run, config, number)
    finally:
        os._exit(code_for_starter(PREEMPTED))


def _speak_for_it(run: RunDirectory, config: DictConfig, number: int) -> None:
    reason = f"{signal.Signals(number).name} before the first step; the same command starts again"
    status = run.status
    if is_first() and status.get("state") in ("starting", "running"):
        run.write_status("preempted", reason)
        status = run.status
    if LAUNCHED_AT not in os.environ:  # else who has started this rank does it
        slurm_jobs.requeue_idle(run, signal.Signals(number).name, config)
    last_line.say(run, status.get("state", "preempted"), status.get("reason", reason))
