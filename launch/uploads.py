"""What of a run on the local disk goes to an object store, in which order, and when.

In the store a checkpoint is whole or not there: its manifest, which comes last, says that the rest
is complete, and `last` moves after that. An upload that ends anywhere leaves what was there before.
"""

import contextlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.object_store import ObjectStore, StoreError
from launch.run_directory import RunDirectory
from launch.signals import undisturbed
from launch.stored_files import (
    CHECKPOINTS,
    MANIFEST,
    OTHERS,
    POINTERS,
    PROGRESS,
    SMALL_FILES,
    checkpoints_in,
    read_last_of,
    write_synced,
)


class Uploads:
    """Mirrors a run into a store: at every checkpoint in a thread, and at its end.

    Training never waits for an upload. Where saves come faster than uploads, the next upload is
    that of the newest checkpoint. What is being uploaded is held by hard links (`.uploading` in the
    run directory), so that it may be deleted from the run meanwhile.
    """

    def __init__(self, run: RunDirectory, store: ObjectStore):
        """Take the run's local directory, and the store at the url of the run."""
        self.run, self.store = run, store
        self._held = run.path / ".uploading"
        self._known: set[str | None] = set()  # what `last` in the store may be
        self._pushing = threading.Lock()
        self._news, self._is_ending = threading.Event(), threading.Event()

    def on_commit(self, path: Path) -> None:
        """Have the run uploaded soon, now that the checkpoint `path` is whole; for any thread."""
        self._news.set()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Upload in a thread of this process; at the end wait until it has done what it was told.

        An upload that fails is told of, and tried again with the next checkpoint.
        """
        self._is_ending.clear()
        self._news.set()  # for what an earlier launch has left
        thread = threading.Thread(target=self._work, name="uploads", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._is_ending.set()
            self._news.set()
            with undisturbed():
                thread.join()

    @contextmanager
    def completed_at_end(self) -> Iterator[None]:
        """At the end upload whatever is not there yet; of a run that is done this must succeed.

        Of one that was stopped or has failed it is told of, and its exit code stays.
        """
        is_done = False
        try:
            yield
            is_done = self.run.status.get("state") == "done"
        finally:
            with undisturbed(), contextlib.nullcontext() if is_done else told():
                self.push()
                print(f"run {self.run.path.name}: uploaded to {self.store.url}", flush=True)

    def push(self) -> None:
        """Upload what the store lacks of the run: first its newest checkpoint, `last` after it.

        Raises:
            StoreError: Something could not be uploaded; names it, and where it is whole.
        """
        with self._pushing:
            try:
                self._push()
            except StoreError as error:
                raise StoreError(
                    f"{error}: what is missing there is whole in {self.run.path}, and is uploaded "
                    f"with the next checkpoint or by that command"
                ) from error
            finally:
                shutil.rmtree(self._held, ignore_errors=True)

    def push_small_files(self) -> None:
        """Upload `SMALL_FILES`.

        Raises:
            StoreError: One could not be uploaded.
        """
        self._write(self._read(SMALL_FILES))

    def _work(self) -> None:
        while not self._is_ending.is_set() or self._news.is_set():
            self._news.wait()
            self._news.clear()
            with told():
                self.push()

    def _push(self) -> None:
        progress = self._read(PROGRESS)  # before `last`: what is said to be done must be there
        folders, pointers = self._hold_newest()
        if not folders:
            self._write(self._read(OTHERS) | progress)
            return
        theirs, ours = read_last_of(self.store), folders[0].name
        self._note_other_writer(theirs)
        write_synced(self.run.path, self.store.url, theirs)  # from here on this disk is ahead of it
        for folder in folders:
            self._upload_checkpoint(folder, may_differ=folder.name == theirs)
        self._write(self._read(OTHERS))
        self._push_samples()
        for name, text in pointers.items():
            if text is None:
                self.store.remove(f"{CHECKPOINTS}/{name}")
            else:
                self.store.write(f"{CHECKPOINTS}/{name}", text.encode())
        self._known.add(ours)
        self.store.write(f"{CHECKPOINTS}/last", f"{ours}\n".encode())
        write_synced(self.run.path, self.store.url, ours)
        self._write(progress)
        if self._upload_older({folder.name for folder in folders}):
            self._forget_old([folder.name for folder in folders])

    def _read(self, names: Iterable[str]) -> dict[str, bytes]:
        paths = {name: self.run.path / name for name in names}
        return {name: path.read_bytes() for name, path in paths.items() if path.exists()}

    def _write(self, files: dict[str, bytes]) -> None:
        for name, content in files.items():
            self.store.write(name, content)

    def _push_samples(self) -> None:
        samples = self.run.path / "samples"
        there = self.store.sizes(samples.name)
        for path in sorted(samples.rglob("*")):
            name = path.relative_to(samples).as_posix()
            if path.is_file() and there.get(name) != path.stat().st_size:
                self.store.upload(path, f"{samples.name}/{name}")

    def _hold_newest(self) -> tuple[list[Path], dict[str, str | None]]:
        """Hold the checkpoints that `last` and `best` name, in this order; also give `POINTERS`."""
        before = None
        while True:
            texts = {
                name: path.read_text() if (path := self.run.checkpoints / name).exists() else None
                for name in ("last", *POINTERS)
            }
            if (last := texts.pop("last")) is None:
                return [], texts
            names = [last.strip()]
            best = json.loads(texts["best"] or "{}").get("checkpoint", names[0])
            if best not in names and (self.run.checkpoints / best).is_dir():
                names.append(best)
            try:
                return [self._hold(name) for name in names], texts
            except FileNotFoundError:
                if before == names:
                    raise
                before = names  # newer ones have come meanwhile, and these have gone

    def _hold(self, name: str) -> Path:
        source, folder = self.run.checkpoints / name, self._held / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for file in (*json.loads((source / MANIFEST).read_bytes())["files"], MANIFEST):
            try:
                os.link(source / file, folder / file)
            except OSError:  # of file systems without hard links
                shutil.copyfile(source / file, folder / file)
        return folder

    def _upload_checkpoint(self, folder: Path, *, may_differ: bool) -> None:
        """Upload a checkpoint that is not there, its manifest last.

        Args:
            folder: Of the checkpoint.
            may_differ: Leave another whole one of that step alone.
        """
        name, manifest = f"{CHECKPOINTS}/{folder.name}", (folder / MANIFEST).read_bytes()
        there = self.store.read(f"{name}/{MANIFEST}")
        if there == manifest or (there and may_differ):
            return
        if there:
            self.store.remove(f"{name}/{MANIFEST}")
        for file in json.loads(manifest)["files"]:
            self.store.upload(folder / file, f"{name}/{file}")
        self.store.write(f"{name}/{MANIFEST}", manifest)

    def _upload_older(self, there: set[str]) -> bool:
        """Upload all others, newest first; whether that is done, and no newer one waits for it."""
        from trainers.checkpoint import list_checkpoints

        for path in reversed(list_checkpoints(self.run.checkpoints)):
            if self._news.is_set():
                return False
            if path.name not in there:
                with contextlib.suppress(FileNotFoundError):  # deleted from the run meanwhile
                    self._upload_checkpoint(self._hold(path.name), may_differ=False)
        return True

    def _forget_old(self, named: list[str]) -> None:
        """Delete from the store as from the disk; set aside what the run went back behind."""
        from trainers.batch_plan import in_steps
        from trainers.callbacks.checkpointing import superseded

        config = self.run.config
        found = checkpoints_in(self.store)
        for name in found:
            if name > named[0] and name not in named:
                self._set_aside(f"{CHECKPOINTS}/{name}", f"{CHECKPOINTS}/abandoned/{name}")
        for name in superseded(
            [name for name in found if name <= named[0]],
            keep_last=config.checkpoints.keep_last,
            keep_every_steps=in_steps(config.checkpoints, "keep_every", config.plan.batch_samples),
            named=named,
        ):
            self._remove(f"{CHECKPOINTS}/{name}")

    def _set_aside(self, name: str, aside: str) -> None:
        files = self.store.sizes(name)
        if MANIFEST in files:
            for file in sorted(files, key=lambda file: file == MANIFEST):
                self.store.copy(f"{name}/{file}", f"{aside}/{file}")
        self._remove(name)

    def _remove(self, name: str) -> None:
        self.store.remove(f"{name}/{MANIFEST}")  # first: what is left then is no checkpoint
        self.store.remove(name)

    def _note_other_writer(self, theirs: str | None) -> None:
        if self._known and theirs not in self._known:
            print(
                f"warning: {self.store.url}/{CHECKPOINTS}/last is {theirs}, which this process has "
                f"not written: does another one train this run?",
                file=sys.stderr,
                flush=True,
            )
        self._known.add(theirs)


@contextmanager
def told() -> Iterator[None]:
    """Print why something could not be uploaded, whatever it is, instead of raising it."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        print(f"warning: not uploaded: {kind}{error}", file=sys.stderr, flush=True)
