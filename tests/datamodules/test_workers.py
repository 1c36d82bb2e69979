import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from datamodules import workers as workers_module
from datamodules.index import Index
from datamodules.loader import TrainLoader, order_of
from datamodules.rows import TextRows

# Python 3.12 and later say so of every fork after torch's threads have started.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def index(make_dataset: Callable[..., Index], tmp_path: Path) -> Index:
    return make_dataset(tmp_path / "train", [[700, 900, 50], [2000], [10, 1500, 330]])


def make_loader(index: Index, num_workers: int) -> TrainLoader:
    rows = TextRows(index, sequence_length=16, document_mask=False, seed=1)
    return TrainLoader(
        rows,
        order_of(rows, seed=1, batch_samples=40, window_mb=1, tail="drop"),
        batch_samples=40,
        micro_batch=40,
        max_samples=400,
        num_workers=num_workers,
        repeat_first_batch=False,
        rank=0,
        world_size=1,
    )


def test_workers_outlive_a_request_to_stop_and_obey_their_parent(index: Index) -> None:
    batches = iter(make_loader(index, 2))
    first = [next(batches), next(batches)]  # each worker has begun
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    _stop(*(worker.pid for worker in workers))
    reference = list(make_loader(index, 0))
    for ours, theirs in zip([*first, *batches], reference, strict=True):
        assert torch.equal(ours["inputs"], theirs["inputs"])


def test_workers_outlive_a_request_to_stop_before_their_first_line(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = workers_module._quiet_signals

    def late() -> None:
        _stop(os.getpid())
        quiet()

    monkeypatch.setattr(workers_module, "_quiet_signals", late)
    reference = make_loader(index, 0)
    for ours, theirs in zip(make_loader(index, 2), reference, strict=True):
        assert torch.equal(ours["inputs"], theirs["inputs"])


def _stop(*processes: int) -> None:
    # By another process, as a launcher or a terminal does.
    numbers = " ".join(map(str, processes))
    kills = [f"kill -{name} {numbers}" for name in ("TERM", "INT", "USR1", "USR2")]
    subprocess.run(" && ".join(kills), shell=True, check=True)


LEAVES = """
import os
import sys
import time
from pathlib import Path
from datamodules.index import read_index
from datamodules.loader import TrainLoader, order_of
from datamodules.rows import TextRows

rows = TextRows(read_index(Path(sys.argv[1])), sequence_length=16, document_mask=False, seed=1)
order = order_of(rows, seed=1, batch_samples=4, window_mb=1, tail="drop")
loader = TrainLoader(rows, order, batch_samples=4, micro_batch=4, max_samples=4000, num_workers=2,
                     repeat_first_batch=False, rank=0, world_size=1)
if sys.argv[2] == "busy":
    # One write: `print` makes two, between which another worker's may come.
    rows.batches = lambda addresses: os.write(1, b"begun\\n") and time.sleep(100)
batches = iter(loader)
next(batches)
if sys.argv[2] == "error":
    raise RuntimeError("with the workers at work")
"""


@pytest.mark.parametrize(("ending", "code"), [("quiet", 0), ("error", 1)])
def test_process_ends_while_workers_read_ahead(index: Index, ending: str, code: int) -> None:
    command = [sys.executable, "-c", LEAVES, str(index.path), ending]
    # Waiting for workers that ignore their parent would take forever.
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == code, ended.stderr


def test_workers_at_work_end_with_a_process_that_is_killed(index: Index) -> None:
    command = [sys.executable, "-c", LEAVES, str(index.path), "busy"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["begun\n"] * 2
        workers = psutil.Process(process.pid).children()
        process.kill()
    _, alive = psutil.wait_procs(workers, timeout=30)
    states = [worker.status() for worker in alive if worker.is_running()]
    assert len(workers) == 2
    assert set(states) <= {psutil.STATUS_ZOMBIE}  # where nobody asks for their codes
