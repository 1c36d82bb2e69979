"""Bytes of remote shards, a block at a time, with retries.

Shards in `s3://`, `gs://` and `http(s)://` are read in ranges through fsspec. What a command gives
(`pipe:`), and a gzipped tar, cannot be read from the middle: their one block is the whole tar,
uncompressed.
"""

import asyncio
import gzip
import io
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from random import SystemRandom
from typing import Any
from urllib.parse import urlsplit

import fsspec
from fsspec.asyn import AsyncFileSystem

from datamodules.sequential import Command, Ranges

_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_PIPE = "pipe:"
_GZIP_MAGIC = b"\x1f\x8b"

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
"""Bounds of the waits between attempts, which double; a store that throttles wants seconds."""

PIECE_BYTES = 8 * 2**20
"""Of a sequential shard that are asked for at a time: an efficient read from an object store."""

_EXTRAS = {
    **{"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"},
    **{"http": "http", "https": "http"},
}
"""Extras of this project that bring the package of a scheme."""

_S3_CONNECTIONS = 64
"""More than are asked for at once: those beyond would wait, and time out before they begin."""

_PASSING_STATUSES = {408, 425, 429}  # of those from 400 to 499, which else tell of a wrong request

log = logging.getLogger(__name__)
_random = SystemRandom()  # shares no state among forked workers, and takes none from the run's seed


@dataclass(frozen=True)
class RemoteBlock:
    """A run of whole samples in a remote shard, which is read at once.

    Attributes:
        url: of the shard.
        offset: of the block in the uncompressed tar, in bytes; 0 for sequential shards.
        num_bytes: of the block, uncompressed.
        digest: of the shard, from the index.
    """

    url: str
    offset: int
    num_bytes: int
    digest: str


def is_remote(url: str) -> bool:
    """Whether a shard is to be fetched: it has a scheme, or is the output of a command."""
    return url.startswith(_PIPE) or _SCHEME.match(url) is not None


def is_sequential(url: str) -> bool:
    """Whether a shard can only be read from its begin to its end, as one block."""
    path = urlsplit(url).path if url.startswith(("http://", "https://")) else url
    return url.startswith(_PIPE) or path.endswith((".gz", ".tgz"))


class Fetcher:
    """Reads blocks of remote shards, again if reading fails in a way that may pass.

    Waits before the second attempt and later ones are drawn from 0 to a bound that doubles ("full
    jitter", M. Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015). May be used
    by several threads, and sent or inherited by fork to other processes.

    Args:
        storage_options: of the fsspec file system, such as `{"endpoint_url": ...}`.
        max_attempts: at reading a block.
        timeout_s: for the answer to one request, or for the next bytes of a command.

    Raises:
        ValueError: nothing could be read.
    """

    def __init__(
        self, *, storage_options: Mapping[str, Any], max_attempts: int, timeout_s: float
    ) -> None:
        if max_attempts < 1:
            raise ValueError(f"max_attempts={max_attempts} -> nothing could be read -> at least 1")
        self._options, self._max_attempts = dict(storage_options), max_attempts
        self._timeout_s = timeout_s
        self._processes: dict[int, _Connections] = {}

    def fetch(
        self,
        block: RemoteBlock,
        check: Callable[[memoryview], None] = lambda content: None,
        on_retry: Callable[[], None] = lambda: None,
    ) -> bytes:
        """Read a block.

        Args:
            block: to be read.
            check: raises ValueError if the bytes are not the right ones; they are read again then.
            on_retry: called before each attempt but the first.

        Raises:
            ValueError: it cannot be read; names url and offset, and the last cause.
        """
        attempt = 1
        while True:
            try:
                content = self._read(block)
                if len(content) != block.num_bytes:
                    found = min(len(content), block.num_bytes)
                    more = "and more " if len(content) > found else ""
                    raise ValueError(f"{found} {more}of {block.num_bytes} bytes came")
                check(memoryview(content))
                return content
            except Exception as err:  # of which kinds, is up to each file system
                if _is_final(err) or attempt == self._max_attempts:
                    raise _failure(block, attempt, err) from err
                log.info("attempt %d at %s, byte %d: %r", attempt, block.url, block.offset, err)
            on_retry()
            time.sleep(_random.uniform(0, min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (attempt - 1))))
            attempt += 1

    def _read(self, block: RemoteBlock) -> bytes:
        if not is_sequential(block.url):
            system, path = self._system(block.url)
            return self._range(system, path, block.offset, block.offset + block.num_bytes)
        with self._open(block.url) as stream:
            # What a command gives does not show in its name.
            packed = stream.peek(len(_GZIP_MAGIC)).startswith(_GZIP_MAGIC)
            content = gzip.GzipFile(fileobj=stream) if packed else stream
            # One byte more than there should be: only at the end are errors told.
            return content.read(block.num_bytes + 1)

    def _open(self, url: str) -> io.BufferedReader:
        """Open a sequential shard, which is still compressed."""
        if url.startswith(_PIPE):
            command = Command(url.removeprefix(_PIPE), self._timeout_s)
            return io.BufferedReader(command, PIECE_BYTES)
        if not is_remote(url):
            return open(url, "rb")
        system, path = self._system(url)
        try:
            size = self._call(system, system._info(path))["size"]
        except FileNotFoundError as err:  # as which fsspec shows every failure of http here
            raise (err.__cause__ if url.startswith("http") and err.__cause__ else err) from None
        if size is None:
            raise _FinalError("the server does not tell its size -> read it with `pipe:curl ...`")
        ranges = Ranges(lambda start, stop: self._range(system, path, start, stop), size)
        return io.BufferedReader(ranges, PIECE_BYTES)

    def _range(self, system: AsyncFileSystem, path: str, start: int, stop: int) -> bytes:
        content = self._call(system, system._cat_file(path, start=start, end=stop))
        if len(content) > stop - start:
            raise _FinalError(
                "the server answers with all of the file where a part was asked for -> each block "
                "would cost a whole shard -> use a server that knows ranges, or copy the shards"
            )
        return content

    def _call(self, system: AsyncFileSystem, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a file system's coroutine in fsspec's thread, and no longer than allowed."""
        assert system.loop is not None
        limited = asyncio.wait_for(coroutine, self._timeout_s)
        try:
            return asyncio.run_coroutine_threadsafe(limited, system.loop).result()
        except TimeoutError as err:
            raise TimeoutError(str(err) or f"no answer within {self._timeout_s} s") from err

    def _system(self, url: str) -> tuple[AsyncFileSystem, str]:
        """Give the file system of a url in this process, connected, and the path in it."""
        pid = os.getpid()
        own = self._processes.get(pid) or self._processes.setdefault(pid, _Connections())
        scheme = url.partition("://")[0]
        with own.lock:
            if scheme not in own.systems:
                system = _make_system(scheme, self._options, self._timeout_s)
                if connect := getattr(system, "set_session", None):
                    self._call(system, connect())  # or several threads would, each for itself
                own.systems[scheme] = system
        return own.systems[scheme], str(own.systems[scheme]._strip_protocol(url))

    def __getstate__(self) -> dict[str, object]:
        """Leave connections behind: the receiving process makes its own."""
        return {**self.__dict__, "_processes": {}}


class _FinalError(ValueError):
    """Trying again cannot help."""


class _Connections:
    """File systems of one process by scheme; connections do not outlive a fork."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.systems: dict[str, AsyncFileSystem] = {}


def _make_system(scheme: str, options: dict[str, Any], timeout_s: float) -> AsyncFileSystem:
    """Make the file system of a scheme, with its own retries off: they would multiply with ours."""
    try:
        kind = fsspec.get_filesystem_class(scheme)
        if scheme in ("s3", "s3a"):
            config = {
                "retries": {"total_max_attempts": 1},
                "connect_timeout": timeout_s,
                "read_timeout": timeout_s,
                "max_pool_connections": _S3_CONNECTIONS,
            }
            config |= options.get("config_kwargs", {})
            options = {**options, "config_kwargs": config}
        system = kind(**options, skip_instance_cache=True)
    except ImportError as err:
        extra = _EXTRAS.get(scheme)
        remedy = f"pip install 'trainyard[{extra}]'" if extra else "install it"
        raise _FinalError(f"{scheme}:// needs a package -> {err} -> {remedy}") from err
    except Exception as err:
        remedy = "correct the url or storage_options"
        raise _FinalError(f"{scheme}:// cannot be opened -> {err} -> {remedy}") from err
    if not isinstance(system, AsyncFileSystem):
        raise _FinalError(
            f"{scheme}:// cannot be read -> its requests have no time limit -> use s3, gs, http(s) "
            "or a command (`pipe:`)"
        )
    vars(system)["retries"] = 1  # of s3fs
    return system


def _is_final(err: Exception) -> bool:
    status = getattr(err, "status", None)  # of aiohttp
    wrong_request = isinstance(status, int) and 400 <= status < 500
    return isinstance(err, (_FinalError, FileNotFoundError, PermissionError)) or (
        wrong_request and status not in _PASSING_STATUSES
    )


def _failure(block: RemoteBlock, attempts: int, err: Exception) -> ValueError:
    problem = f"{block.url}: the block at byte {block.offset} cannot be read"
    if isinstance(err, _FinalError):
        return ValueError(f"{problem}: {err}")
    cause = f"{problem} -> {type(err).__name__}: {err}"
    if _is_final(err):
        return ValueError(f"{cause} -> correct the url, or ask for the right to read it")
    return ValueError(
        f"{cause}, at the last of {attempts} attempts -> look at the store and the network, or "
        "allow more attempts or seconds"
    )
