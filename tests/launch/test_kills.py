"""Killed again and again, at any instant, saves included."""

import random
import time

import pytest
from safetensors.torch import load_file
from torch import equal


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_run_survives_many_kills(small_run, train, start):
    long = [*small_run, "max_steps=400", "checkpoints.every_steps=1"]
    whole = train(*long, "run.name=whole", "checkpoints.every_steps=400")
    killed_path = whole.path.parent / "killed"
    instants = random.Random()
    kills = 0
    for attempt in range(12):
        workers = f"datamodule.num_workers={2 * (attempt % 2)}"
        process = start(*long, "run.name=killed", workers)
        delay = instants.uniform(5.0, 14.0)  # from before the first step to the middle of a save
        try:
            process.wait(timeout=delay)
        except Exception:
            process.kill()
            process.wait()
            kills += 1
            print(f"killed after {delay:.2f} s")
        else:
            assert process.returncode == 0, process.stdout.read()
            break
        time.sleep(0.1)
    resumed = train(*long, "run.name=killed")
    assert kills >= 1
    one, other = (
        load_file(run.find_checkpoint("last") / "weights.safetensors") for run in (whole, resumed)
    )
    assert all(equal(one[name], other[name]) for name in one)
    assert not list((killed_path / "checkpoints").glob(".step-*"))  # nothing half-written is left
