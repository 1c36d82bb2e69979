"""Made-up blocks, a fetcher that notes which it fetches, and processes that read by a cache."""

import fcntl
import mmap
import multiprocessing
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from datamodules.block_cache import BlockCache
from datamodules.remote import Fetcher, RemoteBlock

BLOCK_BYTES = 10_000


def block(number: int) -> RemoteBlock:
    return RemoteBlock("made://up.tar", number * BLOCK_BYTES, BLOCK_BYTES, "digest")


def content_of(block: RemoteBlock) -> bytes:
    return random.Random(block.offset).randbytes(block.num_bytes)


def trust(content: memoryview) -> None:
    pass


class NotingFetcher(Fetcher):
    """Makes blocks up, while its gate is not shut, and notes their numbers in a file."""

    def __init__(self, folder: Path) -> None:
        super().__init__(storage_options={}, max_attempts=1, timeout_s=1.0)
        self._begun, self._gate = folder / "begun", folder / "gate"
        self._begun.touch()

    def fetch(
        self,
        block: RemoteBlock,
        check: Callable[[memoryview], None] = trust,
        on_retry: Callable[[], None] = lambda: None,
    ) -> bytes:
        with self._begun.open("a") as file:
            file.write(f"{block.offset // BLOCK_BYTES}\n")
        while self._gate.exists():
            time.sleep(0.002)
        content = content_of(block)
        check(memoryview(content))
        return content

    def shut(self) -> None:
        self._gate.touch()

    def open(self) -> None:
        self._gate.unlink()

    def begun(self) -> list[int]:
        """Numbers of the blocks that any process began to fetch, in order."""
        return [int(line) for line in self._begun.read_text().split()]


def make_cache(folder: Path, max_blocks: float, **settings: Any) -> BlockCache:
    chosen: dict[str, Any] = {"num_readers": 1, "num_connections": 2, **settings}
    chosen.setdefault("fetcher", NotingFetcher(folder))
    return BlockCache(folder / "cache", max_bytes=int(max_blocks * BLOCK_BYTES), **chosen)


def counts(cache: BlockCache) -> tuple[int, int, int, int]:
    """Hits, misses, uncached and fetched blocks of this process."""
    found = cache.counters
    assert found.fetched_bytes % BLOCK_BYTES == 0
    return found.hits, found.misses, found.uncached, found.fetched_bytes // BLOCK_BYTES


def wait_until(happened: Callable[[], bool]) -> None:
    """Wait for as long as the test may take."""
    while not happened():
        time.sleep(0.005)


@dataclass(frozen=True)
class Folder:
    """What a cache's folder holds and is noted to, seen while nothing in it changes."""

    num_bytes: int
    noted_bytes: int
    num_done: int
    num_parts: int


def look(cache_folder: Path) -> Folder:
    with (cache_folder / "accounts").open("rb") as accounts:
        fcntl.flock(accounts, fcntl.LOCK_SH)
        noted_bytes = int(accounts.read())
        sizes = {path: path.stat().st_size for path in cache_folder.iterdir()}
        fcntl.flock(accounts, fcntl.LOCK_UN)
    suffixes = Counter(path.suffix for path in sizes)
    assert set(suffixes) <= {"", ".block", ".part"}
    num_bytes = sum(size for path, size in sizes.items() if path.suffix)
    return Folder(num_bytes, noted_bytes, suffixes[".block"], suffixes[".part"])


def start(target: Callable[..., None], *args: Any, method: str = "fork") -> BaseProcess:
    process = multiprocessing.get_context(method).Process(target=target, args=args, daemon=True)
    process.start()
    return process


def finish(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.join()
        assert process.exitcode == 0


def read_in_order(cache: BlockCache, numbers: list[int], ahead: int) -> None:
    """Read blocks while expecting those that follow, and compare each byte."""
    for place, number in enumerate(numbers):
        if ahead and place % ahead == 0:
            cache.expect([(block(n), trust) for n in numbers[place : place + 2 * ahead]])
        found = cache.get(block(number), trust)
        assert bytes(found) == content_of(block(number))


def read_one(cache: BlockCache, wanted: RemoteBlock, digest: bytes) -> None:
    found = cache.get(wanted, trust)
    assert isinstance(found, mmap.mmap)
    assert bytes(found) == digest


def read_and_hold(cache: BlockCache, numbers: list[int], done: Path) -> None:
    """Read blocks, tell so, and live on."""
    for number in numbers:
        cache.get(block(number), trust)
    done.touch()
    while os.getppid() != 1:
        time.sleep(0.1)
