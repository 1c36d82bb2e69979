"""Ranks are killed at any instant: `python -m benchmarks.kills` has more strategies and kills."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_run_survives_kills_of_any_rank():
    options = ["strategies=zero2,fsdp", "kills=6", "steps=20"]
    command = [sys.executable, "-m", "benchmarks.kills", *options]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(ended.stdout, ended.stderr)
    assert ended.returncode == 0
    assert ended.stdout.count("kills=6, ") == ended.stdout.count("faults=[]") == 2


def test_run_killed_when_all_was_saved_is_tidied_up(small_run, train):
    run = train(*small_run, "max_steps=2")
    run.write_status("running")
    left = run.checkpoints / ".step-00000001.deleted"
    left.mkdir()
    train(*small_run, "max_steps=2")
    assert run.status["state"] == "done"
    assert not left.exists()
