"""Where a run lives: in a local folder, or in an object store, with a local folder to work in."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from launch.downloads import Downloads
from launch.object_store import ObjectStore, is_url
from launch.run_directory import RunDirectory
from launch.stored_files import checkpoints_in, read_last_of
from launch.uploads import Uploads

POLL_S, FAILED = 0.5, "failed"


class Home:
    """Of a run in a local folder: all of it is there, and there is nothing to do."""

    def pull(self, *which: str, trains: bool = False) -> None:
        """Bring the run's directory to where its home is; see `Downloads`."""

    def push(self) -> None:
        """Bring its home to where the run's directory is; see `Uploads`."""

    def push_small_files(self) -> None:
        """All but checkpoints; the first thing that is written there."""

    def on_commit(self, path: Path) -> None:
        """There is a new checkpoint."""

    @contextmanager
    def uploading(self) -> Iterator[None]:
        """While this process trains."""
        yield

    @contextmanager
    def completed_at_end(self) -> Iterator[None]:
        """While this or other processes train: at the end nothing may be missing there."""
        yield


class StoreHome(Home):
    """Of a run in an object store. Rank 0 uploads; what it uploads all ranks have written."""

    def __init__(self, run: RunDirectory, store: ObjectStore):
        """Take the run's local directory, and the store at the url of the run."""
        self.downloads, self.uploads = Downloads(run, store), Uploads(run, store)
        self.is_rank_zero = os.environ.get("RANK", "0") == "0"
        self.pull = self.downloads.pull
        self.push, self.push_small_files = self.uploads.push, self.uploads.push_small_files
        self.on_commit = self.uploads.on_commit

    @contextmanager
    def uploading(self) -> Iterator[None]:
        """Upload at checkpoints, beside the training; ranks end together.

        Whoever has started them ends all soon after one of them has ended by a request to stop.
        """
        uploading = self.uploads.running() if self.is_rank_zero else nullcontext()
        with self._ending_together("training"), uploading:
            yield

    @contextmanager
    def completed_at_end(self) -> Iterator[None]:
        """Complete the upload; ranks end together."""
        completing = self.uploads.completed_at_end() if self.is_rank_zero else nullcontext()
        with self._ending_together("its last upload"), completing:
            yield

    @contextmanager
    def _ending_together(self, after: str) -> Iterator[None]:
        """Wait for rank 0, however long it uploads after something, and then for one another.

        A collective would give up after `trainer.timeout_s`.

        Raises:
            ValueError: Rank 0 has failed meanwhile.
        """
        key = f"ends/{after}"
        try:
            yield
        except BaseException:
            if self.is_rank_zero and (store := _store_of_ranks()) is not None:
                with suppress(RuntimeError):  # who holds it is gone
                    store.set(key, FAILED)
            raise
        if (store := _store_of_ranks()) is None:
            return
        if self.is_rank_zero:
            store.set(key, "done")
        while not store.check([key]):
            time.sleep(POLL_S)
        if store.get(key).decode() == FAILED:
            raise ValueError(f"rank 0 -> it has failed after {after} -> its output says why")
        import torch
        import torch.distributed as dist

        is_nccl = dist.get_backend() == "nccl"
        dist.barrier(device_ids=[torch.cuda.current_device()] if is_nccl else None)


def home_of(run: RunDirectory, config: DictConfig) -> Home:
    """The home that `runs_dir` names.

    Raises:
        ValueError: It is a url that cannot be opened here.
    """
    if not is_url(config.runs_dir):
        return Home()
    return StoreHome(run, ObjectStore(f"{config.runs_dir.rstrip('/')}/{run.path.name}"))


def directory_of(config: DictConfig) -> RunDirectory:
    """The local directory of the run that a configuration names.

    Raises:
        ValueError: `local_runs_dir` is no local folder.
    """
    local = config.local_runs_dir if is_url(config.runs_dir) else config.runs_dir
    if is_url(local):
        raise ValueError(
            f"local_runs_dir={local} -> runs are written to a disk first -> use a local folder"
        )
    return RunDirectory(Path(local, str(config.run.name)))


def find_run(run: str, config: DictConfig, *which: str) -> RunDirectory:
    """Find a run by `run=<name|path|url>`, and fetch what is not here of it.

    Args:
        run: A name in `runs_dir`, a path, or the url of a run.
        config: Has `runs_dir` and `local_runs_dir`.
        which: Checkpoints that will be read, as `checkpoint=` names them; the first that is there.

    Raises:
        ValueError: There is none; the names that exist are given.
    """
    if is_stored(run, config):
        return _fetch_run(*_split(run, config), Path(config.local_runs_dir), which)
    name, runs_dir = str(run), str(config.runs_dir)
    for path in (Path(runs_dir, name), Path(name)):
        if (path / "config.yaml").exists():
            return RunDirectory(path)
    known = sorted(path.parent.name for path in Path(runs_dir).glob("*/config.yaml"))
    raise _no_such_run(name, runs_dir, known)


def is_stored(run: str, config: DictConfig) -> bool:
    """Whether `run=<name|path|url>` is in an object store."""
    return is_url(run) or (is_url(config.runs_dir) and "/" not in str(run))


def describe_store(run: str, config: DictConfig) -> str:
    """A line on the checkpoints that a store has of a run."""
    runs_dir, name = _split(run, config)
    store = ObjectStore(f"{runs_dir}/{name}")
    last = read_last_of(store)
    names = [f"{each} (last)" if each == last else each for each in checkpoints_in(store)]
    return f"in {store.url}: {', '.join(names) or 'none'}"


def _split(run: str, config: DictConfig) -> tuple[str, str]:
    """Url that runs are below, and name of the run."""
    if is_url(run):
        runs_dir, _, name = str(run).rstrip("/").rpartition("/")
        return runs_dir, name
    return str(config.runs_dir).rstrip("/"), str(run)


def _fetch_run(runs_dir: str, name: str, local: Path, which: tuple[str, ...]) -> RunDirectory:
    path = local / name
    store, run = ObjectStore(f"{runs_dir}/{name}"), RunDirectory(path)
    if store.read("config.yaml") is not None:
        Downloads(run, store).pull(*which)
    if not (path / "config.yaml").exists():
        raise _no_such_run(name, runs_dir, ObjectStore(runs_dir).list())
    return run


def _no_such_run(name: str, runs_dir: str, known: list[str]) -> ValueError:
    names = ", ".join(known) or "none yet: train one first"
    return ValueError(f"run={name} -> no such run in {runs_dir}/ -> there are: {names}")


def _store_of_ranks() -> Any:
    """Where ranks that train tell each other something; None in other processes."""
    if "torch" not in sys.modules:
        return None
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store() if dist.is_initialized() else None
