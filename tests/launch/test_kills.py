"""Killed again and again, at any instant, saves included."""

import random
import signal
import time

import pytest
from safetensors.torch import load_file
from torch import equal

from trainers.metrics import read_metrics

STEPS, ATTEMPTS = 400, 8
ADVANCE = 12
"""Most steps that a run makes before it is killed, a small part of those that it has left."""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_run_survives_many_kills(small_run, train, start):
    long = [*small_run, f"max_steps={STEPS}", "checkpoints.every_steps=1"]
    whole = train(*long, "run.name=whole", f"checkpoints.every_steps={STEPS}")
    killed_path = whole.path.parent / "killed"
    killed_at, start_up_s = [], None
    for attempt in range(ATTEMPTS):
        workers = f"datamodule.num_workers={2 * (attempt % 2)}"
        process = start(*long, "run.name=killed", workers)
        if not attempt:
            wait_for_directory(process, killed_path)
        elif start_up_s and random.random() < 0.25:
            wait_while_it_starts(killed_path, random.uniform(0, start_up_s))
        else:
            start_up_s = wait_for_instant(process, killed_path, start.wait)
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.stdout.read()
        killed_at.append(last_step(killed_path))
        if killed_at[-1] > STEPS // 2:  # the next could end before its kill
            break
    print(f"killed after the steps {killed_at}")
    resumed = train(*long, "run.name=killed")
    one, other = (
        load_file(run.find_checkpoint("last") / "weights.safetensors") for run in (whole, resumed)
    )
    assert all(equal(one[name], other[name]) for name in one)
    assert not list((killed_path / "checkpoints").glob(".step-*"))  # nothing half-written is left


def wait_for_directory(process, run_path):
    """Wait for a run's directory and for some instant after that, most likely before any step."""
    while not run_path.exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.5))


def wait_for_instant(process, run_path, wait):
    """Wait for an instant of a step, a validation or a save; gives the seconds of the start.

    In steps of the run itself, which are of any length.
    """
    began, step, advance = time.monotonic(), last_step(run_path), random.randint(2, ADVANCE)
    wait(process, run_path, step + 1)
    stepping = time.monotonic()
    wait(process, run_path, step + advance)
    seconds_per_step = (time.monotonic() - stepping) / (advance - 1)
    time.sleep(random.uniform(0, min(seconds_per_step, 0.5)))
    return stepping - began


def wait_while_it_starts(run_path, seconds):
    """Wait so long, or less where it starts sooner than before and comes as far as others."""
    deadline, step = time.monotonic() + seconds, last_step(run_path)
    while time.monotonic() < deadline and last_step(run_path) < step + ADVANCE:
        time.sleep(0.01)


def last_step(run_path):
    """The last step of which a run has written a row; 0 if it has none."""
    rows = read_metrics(run_path / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0
