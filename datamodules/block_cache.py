"""Blocks of remote shards on this node's disk, fetched once and ahead of their use.

A process maps the blocks that it used last and those fetched for it ahead of their use. What is
mapped is not removed, so that room is made behind the slowest reader. Where the budget is large
beside a block, the readers together map at most three quarters of it: half of it used, a quarter
ahead. Where they are worker processes, their parents, which evaluate, map an eighth.
"""

import logging
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path

from datamodules.index import digest_bytes
from datamodules.node_disk import NodeDisk
from datamodules.remote import Fetcher, RemoteBlock

OPEN_BLOCKS = 256
"""Bound on mapped blocks; each holds a file descriptor, of which systems often allow 1024."""

UNCACHED_BYTES = 64 * 2**20
"""Bound on the memory that blocks may take in a process for which the disk has no room."""

Check = Callable[[memoryview], None]

log = logging.getLogger(__name__)


@dataclass
class CacheCounters:
    """What a process asked of the cache. A block that it still has is not counted again.

    Attributes:
        hits: blocks that the disk had when they were needed, or another process was fetching.
        misses: blocks that were fetched when they were needed.
        uncached: misses that the disk had no room for.
        fetched_bytes: of all blocks fetched, those ahead of their use among them.
        retries: attempts at fetching but the first ones.
    """

    hits: int = 0
    misses: int = 0
    uncached: int = 0
    fetched_bytes: int = 0
    retries: int = 0


class BlockCache:
    """Gives blocks from this node's disk, and fetches those that it does not have.

    Made before worker processes are, and used in all of them, forked or spawned.

    Args:
        folder: on a local disk; may be shared by several data sets and runs.
        max_bytes: budget of the folder. It should hold twice what the readers of the node work on
            at a time, or blocks are fetched again.
        num_readers: processes of this node that read at the same time.
        num_parents: processes of this node that evaluate while their workers are those readers.
        num_connections: requests of one process at the same time.
        fetcher: of blocks.

    Raises:
        ValueError: the folder cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_bytes: int,
        num_readers: int,
        num_parents: int = 0,
        num_connections: int,
        fetcher: Fetcher,
    ) -> None:
        self._disk, self._fetcher = NodeDisk(folder, max_bytes), fetcher
        self._num_connections = num_connections
        self._share = max_bytes // (4 * num_readers)
        self._parent = os.getpid() if num_parents else None
        self._parent_share = max_bytes // (24 * max(1, num_parents))
        self._processes: dict[int, _Process] = {}

    @property
    def counters(self) -> CacheCounters:
        """What this process asked so far."""
        own = self._own()
        with own.lock:
            return replace(own.counters)

    def take_counts(self) -> dict[str, int]:
        """What this process asked since the last call, by name."""
        own = self._own()
        with own.lock:
            before, own.taken = asdict(own.taken), replace(own.counters)
            return {name: count - before[name] for name, count in asdict(own.taken).items()}

    def get(self, block: RemoteBlock, check: Check) -> mmap.mmap | bytes:
        """Give a block, from the disk, or fetched now if it has not been yet.

        A map keeps its block on the disk, so it is not to be held longer than it is used: asking
        again costs a look-up.

        Args:
            block: which one.
            check: raises ValueError if the bytes are not what the index says; called once for each
                transfer, not for blocks that the disk has.

        Raises:
            ValueError: it cannot be fetched.
        """
        own = self._own()
        with own.lock:
            if (content := own.used.find(block) or own.uncached.find(block)) is not None:
                return content
            content = own.take_ahead(block)
        fetched = False
        if content is None:
            content, fetched = self._obtain(own, block, check)
        if content is None:
            content, fetched = self._fetch(own, block, check), True
        is_mapped = isinstance(content, mmap.mmap)
        with own.lock:
            own.counters.misses += fetched
            own.counters.hits += not fetched
            own.counters.uncached += not is_mapped
            (own.used if is_mapped else own.uncached).add(block, content)
        self._work_ahead(own)
        return content

    def expect(self, blocks: Iterable[tuple[RemoteBlock, Check]]) -> None:
        """Fetch blocks ahead of their use, in this order, in threads; does not wait.

        What was expected before stays so until a block of a later call is asked for. Blocks that
        cannot be fetched are left to `get`, which tells why.
        """
        own, blocks = self._own(), list(blocks)
        with own.lock:
            own.calls += 1
            for block, check in blocks:
                if block in own.ahead:
                    own.ahead[block].last_call = own.calls
                elif own.used.find(block) is None:
                    own.ahead[block] = _Ahead(check, own.calls, own.calls)
        self._work_ahead(own)

    def _own(self) -> "_Process":
        pid = os.getpid()
        if (own := self._processes.get(pid)) is None:
            share = self._parent_share if pid == self._parent else self._share
            own = _Process(share, self._num_connections)
            own = self._processes.setdefault(pid, own)
            for other in self._processes.keys() - {pid}:
                self._processes.pop(other, None)  # copies, by fork, of maps that the parent has
        return own

    def _obtain(
        self, own: "_Process", block: RemoteBlock, check: Check
    ) -> tuple[mmap.mmap | bytes | None, bool]:
        """Give what the disk gives, and whether it was fetched for that."""
        fetched = False

        def make() -> bytes:
            nonlocal fetched
            fetched = True
            return self._fetch(own, block, check)

        name = digest_bytes("\n".join(map(str, astuple(block))).encode())
        return self._disk.obtain(name, block.num_bytes, make), fetched

    def _fetch(self, own: "_Process", block: RemoteBlock, check: Check) -> bytes:
        with own.connections:
            content = self._fetcher.fetch(block, check, own.count_retry)
        with own.lock:
            own.counters.fetched_bytes += len(content)
        return content

    def _work_ahead(self, own: "_Process") -> None:
        """Start threads while there is more to fetch ahead than threads that do so."""
        with own.lock:
            while own.num_threads < self._num_connections:
                if (expected := self._next_ahead(own)) is None:
                    return
                own.num_threads += 1
                threading.Thread(target=self._run_ahead, args=(own, *expected), daemon=True).start()

    def _next_ahead(self, own: "_Process") -> "tuple[RemoteBlock, _Ahead] | None":
        if self._disk.failed:  # what is fetched ahead would be fetched again
            return None
        for block, ahead in own.ahead.items():
            if not ahead.begun:
                if own.ahead_bytes and own.ahead_bytes + block.num_bytes > own.share:
                    return None
                ahead.begun = True
                own.ahead_bytes += block.num_bytes
                return block, ahead
        return None

    def _run_ahead(self, own: "_Process", block: RemoteBlock, ahead: "_Ahead") -> None:
        expected = block, ahead
        while expected is not None:
            block, ahead = expected
            try:
                content, _ = self._obtain(own, block, ahead.check)
                has_room = isinstance(content, mmap.mmap)
            except Exception as err:
                log.debug("not fetched ahead: %s", err)  # `get` will meet it and raise it
                content, has_room = None, True
            with own.lock:
                if not has_room:  # nor is there for others, and looking for some takes time
                    own.forget_waiting()
                if own.ahead.get(block) is ahead:
                    if isinstance(content, mmap.mmap):
                        ahead.content = content
                    else:
                        own.forget_ahead(block)
                content = None
                if (expected := self._next_ahead(own)) is None:
                    own.num_threads -= 1

    def __getstate__(self) -> dict[str, object]:
        """Leave maps and threads behind: the receiving process has its own."""
        return {**self.__dict__, "_processes": {}}


@dataclass
class _Ahead:
    """A block that is expected.

    Attributes:
        check: of its bytes.
        first_call: number of the call of `expect` that expected it first.
        last_call: number of the one that did so last.
        begun: whether it is being fetched, or has been.
        content: its map, once it has been.
    """

    check: Check
    first_call: int
    last_call: int
    begun: bool = False
    content: mmap.mmap | None = None


class _Blocks:
    """The blocks last used, bounded in bytes and number; at least one."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._blocks: OrderedDict[RemoteBlock, mmap.mmap | bytes] = OrderedDict()

    def find(self, block: RemoteBlock) -> mmap.mmap | bytes | None:
        if (content := self._blocks.get(block)) is not None:
            self._blocks.move_to_end(block)
        return content

    def add(self, block: RemoteBlock, content: mmap.mmap | bytes) -> None:
        if self._blocks.pop(block, None) is None:
            self._num_bytes += block.num_bytes
        self._blocks[block] = content
        while len(self._blocks) > 1 and (
            self._num_bytes > self._max_bytes or len(self._blocks) > OPEN_BLOCKS
        ):
            self._num_bytes -= self._blocks.popitem(last=False)[0].num_bytes


class _Process:
    """What one process has of the cache; all but `connections` is under `lock`."""

    def __init__(self, share: int, num_connections: int) -> None:
        self.lock, self.share = threading.Lock(), share  # a part ahead, two used
        self.connections = threading.BoundedSemaphore(num_connections)
        self.used, self.uncached = _Blocks(2 * share), _Blocks(UNCACHED_BYTES)
        self.ahead: OrderedDict[RemoteBlock, _Ahead] = OrderedDict()
        self.ahead_bytes = self.calls = self.num_threads = 0
        self.counters, self.taken = CacheCounters(), CacheCounters()

    def count_retry(self) -> None:
        with self.lock:
            self.counters.retries += 1

    def take_ahead(self, block: RemoteBlock) -> mmap.mmap | None:
        """Give a block that has been fetched ahead, and forget what was expected before it."""
        if (ahead := self.ahead.get(block)) is None:
            return None
        for other in [b for b, entry in self.ahead.items() if entry.last_call < ahead.first_call]:
            self.forget_ahead(other)
        self.forget_ahead(block)
        return ahead.content

    def forget_waiting(self) -> None:
        for block in [b for b, entry in self.ahead.items() if not entry.begun]:
            self.forget_ahead(block)

    def forget_ahead(self, block: RemoteBlock) -> None:
        if self.ahead.pop(block).begun:
            self.ahead_bytes -= block.num_bytes
