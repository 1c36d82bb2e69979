"""The program of the ranks of `test_uploads.py`: an upload takes longer than collectives wait."""

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

COLLECTIVES_WAIT_S, UPLOADS_TAKE_S = 5, 8


@contextmanager
def long_upload() -> Iterator[None]:
    """As those of `Uploads`: it is at the end that there is much to do."""
    yield
    time.sleep(UPLOADS_TAKE_S)


def main(folder: Path) -> None:
    """Leave `<rank>.done` once all is uploaded."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    _set_pg_timeout(timedelta(seconds=COLLECTIVES_WAIT_S), dist.group.WORLD)
    home = StoreHome(RunDirectory(folder / "run"), ObjectStore("memory://runs/run"))
    home.uploads = SimpleNamespace(running=long_upload, completed_at_end=long_upload)  # pyright: ignore[reportAttributeAccessIssue]
    with home.completed_at_end():
        with home.uploading():
            pass
        (folder / f"{rank}.trained").touch()
    (folder / f"{rank}.done").touch()
    if rank:  # the control: a collective does not wait as long
        with pytest.raises(RuntimeError):
            dist.barrier()
    else:
        time.sleep(UPLOADS_TAKE_S)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
