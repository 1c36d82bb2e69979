"""What is freed and asked for again is not taken from the system again."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEPS, BLOCKS, BLOCK_BYTES = 5, 12, 8 * 2**20
PROGRAM = f"""
import resource
from trainers.freed_memory import keep_freed_memory

def step():
    blocks = [bytearray({BLOCK_BYTES}) for _ in range({BLOCKS})]

%s
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({STEPS}):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages_taken(first: str) -> int:
    """Pages that the steps get from the system, after one that does not count."""
    command = [sys.executable, "-c", PROGRAM % first]
    return int(subprocess.check_output(command, text=True, cwd=ROOT))


def test_steps_keep_their_pages(monkeypatch):
    kept, given_back = pages_taken("keep_freed_memory()"), pages_taken("")
    assert 10 * kept < given_back
    assert given_back > STEPS * BLOCKS  # however large pages are, or there is nothing to gain
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "100000")
    assert pages_taken("keep_freed_memory()") > given_back / 2  # the user's word
