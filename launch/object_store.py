"""Files below a url, by fsspec: read, written, listed and removed, with bounded retries.

Credentials and endpoints are fsspec's and the store's affair (environment, `~/.aws`,
`~/.config/fsspec`), so that none of them stands in a configuration.
"""

import os
import posixpath
import re
import time
from collections.abc import Callable
from pathlib import Path
from random import SystemRandom
from typing import Any, TypeVar

ATTEMPTS = 3
FIRST_WAIT_S = 1.0
"""Before the second attempt; then twice that, each drawn from its half to its whole."""

FINAL = (FileNotFoundError, PermissionError, NotImplementedError)
"""What trying again does not mend."""

_IN_PLACE = {"file", "local", "sftp", "ssh", "smb", "hdfs", "webhdfs", "arrow_hdfs"}
"""Schemes where a file is seen while it is written; object stores show it when it is whole."""

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_random = SystemRandom()  # takes no number from the run's seed
Result = TypeVar("Result")


class StoreError(ValueError):
    """A store did not do what it was asked for, at the last attempt either."""


def is_url(text: object) -> bool:
    """Whether a folder is named by a url, which fsspec opens."""
    return _URL.match(str(text)) is not None


class ObjectStore:
    """The files below a url; names are relative to it. May be used by several threads."""

    def __init__(self, url: str):
        """Open the file system of `url`; nothing is asked of it yet.

        Raises:
            ValueError: Its package is not installed, or there is no such scheme.
        """
        import fsspec
        from fsspec.registry import known_implementations

        self.url = url.rstrip("/")
        scheme = url.partition("://")[0]
        self._writes_in_place = scheme in _IN_PLACE
        # Other processes write there too: nothing that was listed may be remembered.
        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        if scheme in ("file", "local"):
            options["auto_mkdir"] = True
        try:
            self._system, self._root = fsspec.core.url_to_fs(self.url, **options)
        except ImportError as error:
            package = known_implementations[scheme]["class"].partition(".")[0]
            raise ValueError(
                f"runs_dir -> {url} needs a package that is not installed ({error}) -> "
                f"pip install {package}"
            ) from error
        except ValueError as error:
            raise ValueError(
                f"runs_dir -> {url} is no url that fsspec opens ({error}) -> use s3://, gs://, or "
                f"another of its schemes, or a local folder"
            ) from error

    def read(self, name: str) -> bytes | None:
        """Content of a small file; None if there is no such file."""

        def read() -> bytes | None:
            try:
                return self._system.cat_file(self._path(name))
            except FileNotFoundError:
                return None

        return self._attempt(f"{self.url}/{name} could not be read", read)

    def write(self, name: str, content: bytes) -> None:
        """Write a small file, so that readers see the old one or the new one, whole."""
        path = self._path(name)

        def write() -> None:
            if not self._writes_in_place:
                self._system.pipe_file(path, content)
                return
            scratch = posixpath.join(
                posixpath.dirname(path), f".{posixpath.basename(path)}.partial"
            )
            self._system.pipe_file(scratch, content)
            self._system.mv(scratch, path)

        self._attempt(f"{self.url}/{name} could not be written", write)

    def upload(self, path: Path, name: str) -> None:
        """Copy a local file there, and see that as many bytes have arrived."""

        def upload() -> None:
            self._system.put_file(str(path), self._path(name))
            arrived, sent = self._system.size(self._path(name)), path.stat().st_size
            if arrived != sent:
                raise OSError(f"{arrived} of its {sent} bytes have arrived")

        self._attempt(f"{self.url}/{name} could not be uploaded", upload)

    def download(self, name: str, path: Path) -> None:
        """Copy a file from there to the local disk, and sync it."""

        def download() -> None:
            self._system.get_file(self._path(name), str(path))
            with path.open("rb") as file:
                os.fsync(file.fileno())

        self._attempt(f"{self.url}/{name} could not be downloaded", download)

    def list(self, folder: str = "") -> list[str]:
        """Names directly below a folder, sorted; none of a folder that is not there."""

        def entries() -> list[str]:
            try:
                return self._system.ls(self._path(folder), detail=False)
            except FileNotFoundError:
                return []

        found = self._attempt(f"{self.url}/{folder} could not be listed", entries)
        names = {str(entry).rstrip("/").rpartition("/")[2] for entry in found}
        return sorted(names - {posixpath.basename(self._path(folder))})

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every file below a folder, by its name relative to that folder."""
        root = self._path(folder)
        found = self._attempt(
            f"{self.url}/{folder} could not be listed",
            lambda: self._system.find(root, detail=True),
        )
        return {posixpath.relpath(path, root): entry["size"] for path, entry in found.items()}

    def remove(self, name: str) -> None:
        """Remove a file or a folder with all that is in it; nothing if it is not there."""

        def remove() -> None:
            try:
                self._system.rm(self._path(name), recursive=True)
            except FileNotFoundError:
                return

        self._attempt(f"{self.url}/{name} could not be removed", remove)

    def copy(self, name: str, other: str) -> None:
        """Copy a file within the store."""
        self._attempt(
            f"{self.url}/{name} could not be copied",
            lambda: self._system.cp_file(self._path(name), self._path(other)),
        )

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}" if name else self._root

    def _attempt(self, problem: str, action: Callable[[], Result]) -> Result:
        wait_s = FIRST_WAIT_S
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return action()
            except Exception as error:  # of whatever kind the package of the store raises
                if isinstance(error, FINAL) or attempt == ATTEMPTS:
                    cause = f"{type(error).__name__}: {error}, at attempt {attempt} of {ATTEMPTS}"
                    raise StoreError(
                        f"runs_dir -> {problem} ({cause}) -> mend the connection, the url or your "
                        f"rights there, then give the same command again"
                    ) from error
            time.sleep(_random.uniform(wait_s / 2, wait_s))
            wait_s *= 2
        raise AssertionError
