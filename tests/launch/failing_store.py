"""An object store in memory whose requests fail when they are told to, and a run to put there."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from launch.downloads import Downloads
from launch.object_store import ObjectStore
from launch.run_directory import RunDirectory
from launch.uploads import Uploads
from trainers.checkpoint import list_checkpoints
from trainers.checkpoint_digests import seal


class Killed(BaseException):
    """The process is gone in the middle of a request."""


class FailingStore(MemoryFileSystem):
    """What is put there while it fails leaves half of a file behind, which real ones do not.

    Attributes:
        failures: What the next changes end by: an exception, or None for one that succeeds.
        always: What each change ends by, once `failures` is used up; None for success.
        changes: The paths that were written or removed, in turn.
    """

    protocol = "failing"
    store: ClassVar[dict[str, Any]] = {}  # pyright: ignore[reportIncompatibleVariableOverride]
    pseudo_dirs: ClassVar[list[str]] = [""]
    failures: ClassVar[list[BaseException | None]] = []
    always: ClassVar[BaseException | None] = None
    changes: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("failing://", "memory://", 1))

    @classmethod
    def clear(cls) -> None:
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
        cls.heal()

    @classmethod
    def heal(cls) -> None:
        cls.failures.clear()
        cls.changes.clear()
        cls.always = None

    def put_file(self, lpath: str, rpath: str, *args: Any, **kwargs: Any) -> None:
        content = Path(lpath).read_bytes()
        try:
            self._change(rpath)
        except BaseException:
            super().pipe_file(rpath, content[: len(content) // 2])
            raise
        super().pipe_file(rpath, content)

    def pipe_file(self, path: str, value: bytes, *args: Any, **kwargs: Any) -> None:
        self._change(path)
        super().pipe_file(path, value)

    def cp_file(self, path1: str, path2: str, **kwargs: Any) -> None:
        self._change(path2)
        super().cp_file(path1, path2)

    def rm(self, path: str, recursive: bool = False, *args: Any, **kwargs: Any) -> None:
        """Some files of a folder go before it fails."""
        for file in sorted(self.find(path)) or [path]:
            self._change(file)
            super().rm(file)

    def _change(self, path: str) -> None:
        self.changes.append(path)
        error = self.failures.pop(0) if self.failures else type(self).always
        if error is not None:
            raise error


fsspec.register_implementation("failing", FailingStore, clobber=True)


class MadeUpRun(RunDirectory):
    """A run directory with checkpoints of a few bytes, as a training would leave it."""

    @classmethod
    def begin(cls, path: Path, *, keep_last: int = 2, keep_every_steps: int | None = None):
        run = cls(path)
        run.checkpoints.mkdir(parents=True)
        keep = f"keep_last: {keep_last}, keep_every_steps: {json.dumps(keep_every_steps)}"
        (path / "config.yaml").write_text(
            f"checkpoints: {{{keep}, keep_every_images: null}}\nplan: {{batch_samples: 1}}\n"
        )
        return run

    def save(self, step: int, *, is_best: bool = False) -> Path:
        """Save, move the pointers, and log up to there."""
        path = self.checkpoints / f"step-{step:08d}"
        path.mkdir()
        content = {"weights.safetensors": b"w%d" % step * 50, "state.pt": b"s%d" % step * 20}
        files = {}
        for name, data in content.items():
            (path / name).write_bytes(data)
            digest = hashlib.blake2b(data, digest_size=32).hexdigest()
            files[name] = {"bytes": len(data), "blake2b": digest}
        manifest = {"format": 3, "step": step, "files": files}
        (path / "manifest.json").write_text(seal(manifest))
        if is_best:
            (self.checkpoints / "best").write_text(json.dumps({"checkpoint": path.name}))
        (self.checkpoints / "last").write_text(path.name + "\n")
        rows = [json.dumps({"step": each}) + "\n" for each in range(1, step + 1)]
        (self.path / "metrics.jsonl").write_text("".join(rows))
        self.write_status("running", step=step)
        return path


def contents(url: str) -> dict[str, bytes]:
    """Every file below a url, by its name below it."""
    system, root = fsspec.core.url_to_fs(url)
    return {path.removeprefix(f"{root}/"): system.cat_file(path) for path in system.find(root)}


def num_checkpoints(url: str) -> Counter[str]:
    """Files of each checkpoint below the url of a run."""
    names = (name for name in contents(url) if name.startswith("checkpoints/step-"))
    return Counter(name.split("/")[1] for name in names)


GONE = OSError("the network is gone")
URL = "failing://bucket/runs/one"


def push(run: RunDirectory) -> None:
    """Upload what is missing there."""
    Uploads(run, ObjectStore(URL)).push()


def pull(path: Path, which: str = "last") -> RunDirectory:
    """Fetch the run, to be continued, to the folder `path`."""
    run = RunDirectory(path)
    Downloads(run, ObjectStore(URL)).pull(which, trains=True)
    return run


def steps(run: RunDirectory) -> list[int]:
    """Of its checkpoints here."""
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(run.checkpoints)]
