"""What of a run in an object store comes to the local disk before it is continued or read."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from launch.object_store import ObjectStore, StoreError
from launch.resume_rules import differences
from launch.run_directory import RunDirectory
from launch.stored_files import (
    CHECKPOINTS,
    MANIFEST,
    POINTERS,
    SMALL_FILES,
    STEP,
    checkpoints_in,
    is_store_ahead,
    look_at,
    read_last_of,
    read_synced,
    write_synced,
)

ATTEMPTS = 2
"""At bytes that are not what was saved: they may have been damaged on the way."""


class Downloads:
    """Brings a run's local directory to where the store is, if that is ahead.

    Checkpoints come first, each into a directory of another name until its digests are right; then
    small files, and `last` at the end. So a fetch that ends anywhere begins again.
    """

    def __init__(self, run: RunDirectory, store: ObjectStore):
        """Take the run's local directory, and the store at the url of the run."""
        self.run, self.store = run, store

    def pull(self, *which: str, trains: bool = False) -> None:
        """Fetch what the store is ahead in, and of checkpoints only those that are asked for.

        Args:
            which: `last`, `best` or names, of which the first that is there is needed; what else it
                is, a path, is no affair of the store.
            trains: Whether the run goes on from it: then `best` is fetched too, and the name of a
                checkpoint that it went back to before means `last`.

        Raises:
            ValueError: A checkpoint is not there, or not what was saved; the store does not answer;
                or what the disk has under this name is another run.
        """
        with self._alone():
            if not trains and self._is_trained_here():
                return
            theirs, ours = read_last_of(self.store), self._last_here()
            if theirs is None and ours is None:
                self._fetch_small_files()
                return
            synced = read_synced(self.run.path, self.store.url)
            if theirs and ours and synced is None:
                self._refuse_another_run()
            is_behind = is_store_ahead(theirs, ours, synced)
            pointers = {name: self._pointer(name, is_behind) for name in POINTERS}
            last = str(theirs if is_behind else ours)
            names = _resolve(which, last, pointers, trains)
            for name in names:
                self._fetch(name, is_behind, is_asked_for=name in (last, *which))
            if is_behind:
                self._take_over(pointers, last if last in names else None)

    def _last_here(self) -> str | None:
        from trainers.checkpoint import read_last

        name = read_last(self.run.checkpoints)
        return name if name and (self.run.checkpoints / name / MANIFEST).exists() else None

    def _pointer(self, name: str, is_behind: bool) -> str | None:
        if is_behind:
            content = self.store.read(f"{CHECKPOINTS}/{name}")
            return None if content is None else content.decode()
        path = self.run.checkpoints / name
        return path.read_text() if path.exists() else None

    def _take_over(self, pointers: dict[str, str | None], last: str | None) -> None:
        """Make the disk say what the store says; of `last` only if that checkpoint is here."""
        from trainers.durable_files import write_atomically

        self._fetch_small_files()
        for name, text in pointers.items():
            if text is None:
                (self.run.checkpoints / name).unlink(missing_ok=True)
            else:
                write_atomically(self.run.checkpoints / name, text)
        if last is not None:
            write_atomically(self.run.checkpoints / "last", last + "\n")
            self.run.set_aside_after(last)
            write_synced(self.run.path, self.store.url, last)

    def _fetch_small_files(self) -> None:
        for name in SMALL_FILES:
            path, content = self.run.path / name, self.store.read(name)
            if content is not None:
                scratch = path.with_name(f".{name}.partial")
                scratch.write_bytes(content)
                scratch.replace(path)
            elif name == "summary.json":  # of an end that the run went back behind
                path.unlink(missing_ok=True)

    def _fetch(self, name: str, is_behind: bool, is_asked_for: bool) -> None:
        """Fetch a checkpoint that is not here; if the store is ahead also one that differs."""
        from trainers.checkpoint import remove_checkpoint
        from trainers.durable_files import sync_directory

        path = self.run.checkpoints / name
        if path.is_dir() and not is_behind:
            return
        manifest, damage = look_at(self.store, name)
        if path.is_dir() and (path / MANIFEST).read_bytes() == manifest:
            return
        if not manifest and name not in checkpoints_in(self.store):
            known = ", ".join(["last", "best", *checkpoints_in(self.store)])
            raise ValueError(
                f"checkpoint={name} -> {self.store.url} has none of that name -> use one of {known}"
            )
        print(f"run {self.run.path.name}: fetching {name} from {self.store.url}", flush=True)
        scratch = self.run.checkpoints / f".fetching-{name}"
        for _ in range(ATTEMPTS if damage is None else 0):
            if (damage := self._download(name, manifest, scratch)) is None:
                break
        if damage is not None:
            shutil.rmtree(scratch, ignore_errors=True)
            raise ValueError(
                f"checkpoint={name} -> in {self.store.url}/{CHECKPOINTS}/{name} {damage} -> do not "
                f"use it{self._offer(name) if is_asked_for else self._without_best()}"
            )
        if path.is_dir():
            remove_checkpoint(path)
        scratch.replace(path)
        sync_directory(path.parent)

    def _download(self, name: str, manifest: bytes, scratch: Path) -> str | None:
        """Fetch the files of a checkpoint; gives what is wrong with them."""
        from trainers.checkpoint import read_manifest, verify

        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        (scratch / MANIFEST).write_bytes(manifest)
        with (scratch / MANIFEST).open("rb") as file:
            os.fsync(file.fileno())
        try:
            for file in read_manifest(scratch)["files"]:
                self.store.download(f"{CHECKPOINTS}/{name}/{file}", scratch / file)
            verify(scratch)
        except StoreError:
            raise
        except ValueError as error:
            _, why, remedy = str(error).split(" -> ", 2)
            if remedy == "use that version":
                raise ValueError(f"checkpoint={name} -> {why} -> {remedy}") from error
            return why
        return None

    def _offer(self, name: str) -> str:
        """The newest that seems whole before `name`, else after it, as the end of a sentence."""
        here = {path.name for path in self.run.checkpoints.glob("step-*")}
        there = sorted({*checkpoints_in(self.store), *here} - {name}, reverse=True)
        for other in sorted(there, key=lambda other: other > name):
            if other in here or look_at(self.store, other)[1] is None:
                place = "the one before it" if other < name else "a later one"
                return f"; {place} is there: checkpoint={other}"
        return "; there is no other one: start again under another run.name"

    def _without_best(self) -> str:
        return f"; to continue without a best checkpoint delete {self.store.url}/{CHECKPOINTS}/best"

    def _refuse_another_run(self) -> None:
        content = self.store.read("config.yaml")
        if content is None:
            return
        theirs = OmegaConf.create(content.decode())
        assert isinstance(theirs, DictConfig)
        if lines := differences(theirs, self.run.config):
            raise ValueError(
                f"run.name={self.run.path.name} -> {self.store.url} and {self.run.path} are two "
                "runs:\n  "
                + "\n  ".join(lines)
                + "\n-> choose another run.name, or another local_runs_dir"
            )

    def _is_trained_here(self) -> bool:
        """Whether another process trains it on this disk, which is then ahead."""
        try:
            with self.run.lock():
                return False
        except ValueError:
            return True

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time: each rank of torchrun's comes here."""
        self.run.checkpoints.mkdir(parents=True, exist_ok=True)
        with (self.run.path / ".fetching").open("a") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            for leftover in self.run.checkpoints.glob(".fetching-*"):
                shutil.rmtree(leftover)
            yield


def _resolve(
    which: tuple[str, ...], last: str, pointers: dict[str, str | None], trains: bool
) -> list[str]:
    """Names of the checkpoints to fetch; a `best` that the run goes on before is forgotten."""
    best = json.loads(pointers["best"] or "{}").get("checkpoint")
    best = best if STEP.fullmatch(str(best)) else None
    names = {"last": last, "best": best}
    if trains and (to := json.loads(pointers["went_back"] or "{}").get("to")):
        names[to] = last
    found = [name for each in which if (name := names.get(each, each))][:1]
    found = [name for name in found if STEP.fullmatch(name)]
    if trains and best and best > (found or [last])[0]:
        pointers["best"] = None
    elif trains and best and best not in found:
        found.append(best)
    return found
