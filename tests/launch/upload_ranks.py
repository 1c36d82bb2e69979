"""The program of the ranks of `test_uploads.py`: an upload is long, or fails, and others wait."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from launch.object_store import ObjectStore
from launch.run_directory import RunDirectory
from launch.run_home import StoreHome

COLLECTIVES_WAIT_S, UPLOADS_TAKE_S = 10, 15


@contextmanager
def long_upload() -> Iterator[None]:
    """As those of `Uploads`: it is at the end that there is much to do."""
    yield
    time.sleep(UPLOADS_TAKE_S)


@contextmanager
def failed_upload() -> Iterator[None]:
    """An upload that rank 0 gives up."""
    yield
    raise ValueError("the store -> refuses -> ask it why")


def upload_for_long(home: StoreHome, folder: Path, rank: int) -> None:
    """Leave `<rank>.done` once all is uploaded; a collective does not wait as long."""
    home.uploads = SimpleNamespace(running=long_upload, completed_at_end=long_upload)  # pyright: ignore[reportAttributeAccessIssue]
    with home.completed_at_end():
        with home.uploading():
            pass
        (folder / f"{rank}.trained").touch()
    (folder / f"{rank}.done").touch()
    if rank:
        with pytest.raises(RuntimeError, match=r"(?i)timed out"):
            dist.barrier()
        (folder / "given_up").touch()
    while not (folder / "given_up").exists():
        time.sleep(0.1)


def fail_to_upload(home: StoreHome, folder: Path, rank: int) -> None:
    """Leave `<rank>.failed`, of all ranks since rank 0 has."""
    home.uploads = SimpleNamespace(completed_at_end=failed_upload)  # pyright: ignore[reportAttributeAccessIssue]
    reason = "rank 0 -> it has failed" if rank else "ask it why"
    with pytest.raises(ValueError, match=reason), home.completed_at_end():
        pass
    (folder / f"{rank}.failed").touch()
    dist.barrier()  # who holds the store stays until the other has read it


def main(folder: Path, case: str) -> None:
    """Let two ranks end in one of the two ways."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    _set_pg_timeout(timedelta(seconds=COLLECTIVES_WAIT_S), dist.group.WORLD)
    home = StoreHome(RunDirectory(folder / "run"), ObjectStore("memory://runs/run"))
    {"long": upload_for_long, "failed": fail_to_upload}[case](home, folder, rank)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
