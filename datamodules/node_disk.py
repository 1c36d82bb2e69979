"""Files on a node's disk that its processes share, within a budget of bytes.

A file is made once, under an exclusive lock, while the others that want it wait. Whoever has it
mapped holds a shared lock, by the descriptor that the map keeps: files are removed in the order of
their last use, and those that are locked are passed over. The system drops the locks of killed
processes, so that nothing is left of them but unlocked temporary files, which whoever needs room
next removes.
"""

import fcntl
import logging
import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_DONE, _PART, _ACCOUNTS = ".block", ".part", "accounts"

_EVICTED_SHARE = 1 / 16
"""Of the budget, that is freed beyond what is needed: the folder is listed more rarely then."""

log = logging.getLogger(__name__)

_descriptors: set[int] = set()
"""Open in the midst of a call: a process forked at that moment closes its copies, which would keep
locks."""


class NodeDisk:
    """A folder of files that are made on demand and removed when there is no room.

    The bytes in it, of unfinished files among them, never exceed the budget; a file of which a
    process holds a map is never removed. Takes `flock`, as local file systems do. Files are kept
    for later runs, and the folder may be shared by several data sets and runs.

    Args:
        folder: made if there is none.
        max_bytes: the budget.

    Attributes:
        failed: whether writing failed, as it does on a full disk.

    Raises:
        ValueError: the folder cannot be used.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self.failed, self._warnings_left = False, [True]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._accounts() as accounts:
                _write_total(accounts, self._make_room(0))
        except OSError as err:
            raise ValueError(
                f"cache folder {folder} -> cannot be used: {err} -> choose a folder on a local disk"
            ) from err

    def obtain(
        self, name: str, num_bytes: int, make: Callable[[], bytes]
    ) -> mmap.mmap | bytes | None:
        """Map a file, which is made first if it is not there.

        Args:
            name: of the file.
            num_bytes: of its content.
            make: gives the content; is not called by two processes at once for one name.

        Returns:
            The map, on which the file stays for as long as it lives. None where there is no room,
            and the content itself where writing it failed; both are warned of once.
        """
        content = None
        try:
            while (mapped := self._map(name)) is None:
                if (part := self._claim(name)) is None:
                    continue
                try:
                    if (mapped := self._map(name)) is not None:
                        return mapped
                    if not self._reserve(part, num_bytes):
                        self._warn("all that is in it is in use")
                        return None
                    content = make()
                    return self._publish(part, name, content)
                finally:
                    self._release(part, name)
            return mapped
        except OSError as err:
            self.failed = True
            self._warn(str(err))
            return content

    def _path(self, name: str, suffix: str) -> Path:
        return self._folder / f"{name}{suffix}"

    def _map(self, name: str) -> mmap.mmap | None:
        try:
            file = _open(self._path(name, _DONE), os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_SH)  # waits for no more than a removal
            return _use(file) if os.fstat(file).st_nlink else None
        finally:
            _close(file)  # the map has a copy, which keeps the lock

    def _claim(self, name: str) -> int | None:
        """Lock the temporary file of a name; None after having waited for another who had it."""
        path = self._path(name, _PART)
        part = _open(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(path).st_ino == os.fstat(part).st_ino:
                return part
        except BlockingIOError:
            # Shared: its owner keeps a shared lock once it is finished.
            fcntl.flock(part, fcntl.LOCK_SH)
        except FileNotFoundError:
            pass  # finished, or removed, between opening and locking it
        _close(part)
        return None

    def _reserve(self, part: int, num_bytes: int) -> bool:
        with self._accounts() as accounts:
            # A killed process may have begun the same file.
            more = num_bytes - os.fstat(part).st_size
            total = _read_total(accounts)
            if total is None or total + more > self._max_bytes:
                total = self._make_room(more)
            has_room = total + more <= self._max_bytes
            # Written first: a process killed here leaves too high a sum, which is put right when
            # the folder is listed, never too low a one.
            _write_total(accounts, total + more if has_room else total)
            if has_room:
                os.ftruncate(part, num_bytes)
        return has_room

    def _publish(self, part: int, name: str, content: bytes) -> mmap.mmap:
        rest = memoryview(content)
        while rest:
            rest = rest[os.pwrite(part, rest, len(content) - len(rest)) :]
        os.fsync(part)  # or a power failure may leave the name and not the bytes
        with self._accounts():  # nobody may remove it before it is locked again
            os.rename(self._path(name, _PART), self._path(name, _DONE))
            fcntl.flock(part, fcntl.LOCK_SH)
            return _use(part)

    def _release(self, part: int, name: str) -> None:
        """Close a claimed file, and remove it if it was not finished."""
        path = self._path(name, _PART)
        try:
            with self._accounts() as accounts:
                # Nobody else makes another of this name while this one is locked.
                if path.exists() and path.stat().st_ino == os.fstat(part).st_ino:
                    total = _read_total(accounts)
                    path.unlink()
                    if total is not None:
                        _write_total(accounts, total - os.fstat(part).st_size)
                    fcntl.flock(part, fcntl.LOCK_UN)
        finally:
            _close(part)

    def _make_room(self, num_bytes: int) -> int:
        """Remove what nobody uses until so many bytes fit in.

        Returns:
            Bytes in the folder.
        """
        total, found = 0, []
        for entry in os.scandir(self._folder):
            if entry.name.endswith(_PART) and _remove_unlocked(entry.path):
                continue
            if entry.name.endswith((_PART, _DONE)):
                facts = entry.stat()
                total += facts.st_size
                if entry.name.endswith(_DONE):
                    found.append((facts.st_mtime_ns, facts.st_size, entry.path))
        if total + num_bytes <= self._max_bytes:
            return total
        aim = self._max_bytes - num_bytes - int(self._max_bytes * _EVICTED_SHARE)
        for _, size, path in sorted(found):
            if total <= aim:
                break
            if _remove_unlocked(path):
                total -= size
        return total

    @contextmanager
    def _accounts(self) -> Iterator[int]:
        """Lock the sum of bytes in the folder, and with it what the folder holds."""
        accounts = _open(self._folder / _ACCOUNTS, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(accounts, fcntl.LOCK_EX)
            yield accounts
        finally:
            fcntl.flock(accounts, fcntl.LOCK_UN)  # closing leaves it locked if a fork copied it
            _close(accounts)

    def _warn(self, problem: str) -> None:
        try:
            self._warnings_left.pop()  # by one thread only
        except IndexError:
            return
        log.warning(
            "cache folder %s of at most %d bytes: %s -> blocks that do not get in are fetched "
            "each time -> allow more bytes, or free the disk",
            *(self._folder, self._max_bytes, problem),
        )


def _use(file: int) -> mmap.mmap:
    now = time.time_ns()
    os.utime(file, ns=(now, now))  # finer than the system's own
    return mmap.mmap(file, 0, access=mmap.ACCESS_READ)


def _remove_unlocked(path: str) -> bool:
    file = _open(path, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    except BlockingIOError:
        return False
    finally:
        _close(file)
    return True


def _read_total(accounts: int) -> int | None:
    written = os.pread(accounts, 20, 0)
    return int(written) if written else None


def _write_total(accounts: int, total: int) -> None:
    os.pwrite(accounts, b"%020d" % total, 0)


def _open(path: Path | str, flags: int) -> int:
    file = os.open(path, flags, 0o644)
    _descriptors.add(file)
    return file


def _close(file: int) -> None:
    _descriptors.discard(file)
    os.close(file)


def _close_inherited() -> None:
    for file in _descriptors:
        os.close(file)
    _descriptors.clear()


os.register_at_fork(after_in_child=_close_inherited)
