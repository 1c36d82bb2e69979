import errno
import logging
import mmap
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from datamodules import block_cache, node_disk, remote
from datamodules.node_disk import NodeDisk
from datamodules.remote import Fetcher, RemoteBlock
from tests.datamodules.cache_readers import (
    BLOCK_BYTES,
    NotingFetcher,
    block,
    content_of,
    finish,
    look,
    make_cache,
    read_and_hold,
    read_in_order,
    read_one,
    start,
    trust,
    wait_until,
)
from tests.datamodules.object_store import ObjectStore

CONTENT = random.Random(0).randbytes(400_000)


@pytest.fixture(scope="session")
def store() -> Iterator[ObjectStore]:
    store = ObjectStore()
    yield store
    store.close()


@pytest.fixture
def noting(tmp_path: Path) -> NotingFetcher:
    return NotingFetcher(tmp_path)


def counts(cache: block_cache.BlockCache) -> tuple[int, int, int, int]:
    found = cache.counters
    assert found.fetched_bytes % BLOCK_BYTES == 0
    return found.hits, found.misses, found.uncached, found.fetched_bytes // BLOCK_BYTES


def test_blocks_of_an_object_store_are_fetched_once(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    url = store.put("cached.tar", CONTENT)
    fetcher = Fetcher(storage_options=store.options, max_attempts=4, timeout_s=60.0)
    checked: list[int] = []

    def check(content: memoryview) -> None:
        checked.append(len(content))
        if bytes(content) not in CONTENT:
            raise ValueError("not the bytes of the index")

    blocks = [RemoteBlock(url, start, 100_000, "d") for start in range(0, 400_000, 100_000)]
    store.faults["cached.tar"] = ["unavailable", "corrupt", "truncated"]
    caches = [make_cache(tmp_path, 100, fetcher=fetcher) for _ in range(3)]
    for turn, cache in enumerate(caches):
        for wanted in blocks:
            assert bytes(cache.get(wanted, check)) == CONTENT[wanted.offset :][:100_000]
        found = cache.counters
        counted = found.hits, found.misses, found.fetched_bytes, found.retries
        assert counted == ((0, 4, 400_000, 3) if turn == 0 else (4, 0, 0, 0))
    assert store.reads["cached.tar"] == 7
    assert checked == [100_000] * 5
    # Blocks cut in another way are others. Forked and spawned processes connect for themselves.
    first, second = (RemoteBlock(url, start, 50_000, "d") for start in (0, 50_000))
    forked = start(read_one, caches[2], first, CONTENT[:50_000])
    spawned = start(read_one, caches[2], second, CONTENT[50_000:100_000], method="spawn")
    finish([forked, spawned])
    assert store.reads["cached.tar"] == 9


def test_wrong_bytes_are_never_kept(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    url = store.put("wrong.tar", CONTENT)
    fetcher = Fetcher(storage_options=store.options, max_attempts=3, timeout_s=60.0)
    cache = make_cache(tmp_path, 100, fetcher=fetcher)
    store.faults["wrong.tar"] = ["corrupt"] * 3

    def check(content: memoryview) -> None:
        if bytes(content) != CONTENT[:5000]:
            raise ValueError("not the bytes of the index")

    with pytest.raises(ValueError, match=r"wrong.tar: .*not the bytes .* of 3 attempts"):
        cache.get(RemoteBlock(url, 0, 5000, "d"), check)
    assert look(tmp_path / "cache").num_bytes == 0
    assert bytes(cache.get(RemoteBlock(url, 0, 5000, "d"), check)) == CONTENT[:5000]
    assert cache.counters.retries == 2


@pytest.mark.parametrize("is_broken", [False, True])
def test_budget_holds_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_broken: bool
) -> None:
    if is_broken:  # the same look must see a budget that does not hold
        monkeypatch.setattr(NodeDisk, "_make_room", lambda disk, num_bytes: 0)
    cache = make_cache(tmp_path, 12.5, num_readers=3, num_connections=3)
    draw = random.Random(0)
    orders = [[draw.randrange(40) for _ in range(150)] for _ in range(3)]
    aheads = (0, 5, 9)
    readers = [start(read_in_order, cache, *each) for each in zip(orders, aheads, strict=True)]
    peak = 0
    while any(reader.is_alive() for reader in readers):
        peak = max(peak, look(tmp_path / "cache").num_bytes)
    finish(readers)
    assert peak > 8 * BLOCK_BYTES
    assert (peak <= 12.5 * BLOCK_BYTES) != is_broken


def test_least_recently_used_goes_first_and_mapped_stays(
    tmp_path: Path, noting: NotingFetcher
) -> None:
    # Blocks used last: no more than one each.
    holder, reader = (make_cache(tmp_path, 4.5, num_readers=9) for _ in range(2))
    held = holder.get(block(0), trust)
    for number in (1, 2, 3, 1):
        reader.get(block(number), trust)
    assert noting.begun() == [0, 1, 2, 3]
    reader.get(block(4), trust)  # in the place of 2, since 0 is mapped and 1 was used again
    assert look(tmp_path / "cache").num_done == 4
    for number in (0, 1, 3, 4):
        make_cache(tmp_path, 4.5, num_readers=9).get(block(number), trust)
    assert noting.begun() == [0, 1, 2, 3, 4]
    assert bytes(held) == content_of(block(0))
    # Once the map is gone, so is the protection.
    holder.get(block(1), trust)
    del held
    for number in (5, 6, 7):
        reader.get(block(number), trust)
    reader.get(block(0), trust)
    assert noting.begun()[-4:] == [5, 6, 7, 0]


def test_processes_fetch_each_block_once(tmp_path: Path, noting: NotingFetcher) -> None:
    cache = make_cache(tmp_path, 100, num_readers=4)
    noting.shut()
    order = list(range(12))
    readers = [start(read_in_order, cache, order, ahead) for ahead in (0, 0, 4, 4)]
    wait_until(lambda: len(noting.begun()) >= 2)
    noting.open()
    finish(readers)
    assert sorted(noting.begun()) == order


def test_killed_process_leaves_nothing_behind(tmp_path: Path, noting: NotingFetcher) -> None:
    cache = make_cache(tmp_path, 3, num_readers=9)
    victim = start(read_and_hold, cache, [0], tmp_path / "done")
    wait_until((tmp_path / "done").exists)
    noting.shut()
    fetching = start(read_and_hold, cache, [1], tmp_path / "never")
    wait_until(lambda: 1 in noting.begun())
    heir = start(read_in_order, cache, [1], 0)  # waits for what will never come
    assert look(tmp_path / "cache").num_parts == 1
    for process in (victim, fetching):
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    wait_until(lambda: noting.begun().count(1) == 2)  # the heir fetches it
    assert look(tmp_path / "cache").num_bytes == 2 * BLOCK_BYTES
    assert heir.pid is not None
    os.kill(heir.pid, signal.SIGKILL)
    heir.join()
    noting.open()
    assert look(tmp_path / "cache").num_parts == 1
    held = [make_cache(tmp_path, 3).get(block(number), trust) for number in (2, 3, 4)]
    assert all(isinstance(content, mmap.mmap) for content in held)  # needs all of the room
    assert look(tmp_path / "cache").num_parts == 0


def test_forked_process_does_not_keep_its_parents_blocks(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, 2, num_readers=9)
    cache.get(block(0), trust)
    child = start(read_and_hold, cache, [1], tmp_path / "done")
    wait_until((tmp_path / "done").exists)
    cache.get(block(1), trust)  # the parent lets go of 0
    assert isinstance(cache.get(block(2), trust), mmap.mmap)
    assert look(tmp_path / "cache").num_done == 2
    child.kill()
    child.join()


def test_blocks_pass_by_a_cache_that_is_all_in_use(
    tmp_path: Path, noting: NotingFetcher, caplog: pytest.LogCaptureFixture
) -> None:
    cache = make_cache(tmp_path, 2)
    held = [cache.get(block(number), trust) for number in (0, 1)]
    cache.expect([(block(5), trust)])  # has no room, so it is not fetched for nothing
    for number in (2, 3, 2, 3):
        found = cache.get(block(number), trust)
        assert isinstance(found, bytes)
        assert found == content_of(block(number))
    assert sorted(noting.begun()) == [0, 1, 2, 3]
    assert counts(cache) == (0, 4, 2, 4)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "all that is in it is in use" in caplog.text
    del held


def test_expected_blocks_are_there_when_needed(tmp_path: Path, noting: NotingFetcher) -> None:
    cache = make_cache(tmp_path, 100, num_connections=1)
    order = random.Random(0).sample(range(20), 20)
    cache.expect([(block(number), trust) for number in order])
    wait_until(lambda: look(tmp_path / "cache").num_done == 20)
    assert noting.begun() == order
    read_in_order(cache, order, 0)
    assert counts(cache) == (20, 0, 0, 20)


def test_fetching_ahead_stays_within_its_share(tmp_path: Path, noting: NotingFetcher) -> None:
    cache = make_cache(tmp_path, 32, num_readers=2, num_connections=8)
    cache.expect([(block(number), trust) for number in range(20)])
    wait_until(lambda: look(tmp_path / "cache").num_done == 4)  # a quarter of 16
    cache.get(block(0), trust)
    wait_until(lambda: look(tmp_path / "cache").num_done == 5)
    assert sorted(noting.begun()) == [0, 1, 2, 3, 4]
    # Those of an earlier call that nobody asked for make way once a later one is under way.
    cache.expect([(block(number), trust) for number in range(30, 40)])
    cache.get(block(30), trust)
    wait_until(lambda: {31, 32, 33, 34} <= set(noting.begun()))
    assert set(noting.begun()) == {0, 1, 2, 3, 4, *range(30, 35)}


def test_requests_of_a_process_are_bounded(tmp_path: Path, noting: NotingFetcher) -> None:
    cache = make_cache(tmp_path, 100, num_connections=3)
    noting.shut()
    cache.expect([(block(number), trust) for number in range(10)])
    wait_until(lambda: len(noting.begun()) == 3)
    reader = block_cache.threading.Thread(target=cache.get, args=(block(20), trust))
    reader.start()
    reader.join(0.2)
    assert sorted(noting.begun()) == [0, 1, 2]
    noting.open()
    reader.join()
    wait_until(lambda: len(noting.begun()) == 11)


def test_failure_ahead_is_told_when_the_block_is_needed(
    tmp_path: Path, noting: NotingFetcher
) -> None:
    def refuse(content: memoryview) -> None:
        raise ValueError("not the bytes of the index")

    cache = make_cache(tmp_path, 100)
    cache.expect([(block(0), refuse), (block(1), trust)])
    wait_until(lambda: look(tmp_path / "cache").num_done == 1)
    with pytest.raises(ValueError, match="not the bytes of the index"):
        cache.get(block(0), refuse)
    assert counts(cache)[:2] == (0, 0)
    assert bytes(cache.get(block(0), trust)) == content_of(block(0))


def test_full_disk_is_no_cache(
    tmp_path: Path,
    noting: NotingFetcher,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = make_cache(tmp_path, 100)
    cache.get(block(0), trust)
    write = os.pwrite

    def refuse(file: int, content: Any, offset: int) -> int:
        if len(content) < 100:
            return write(file, content, offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(node_disk.os, "pwrite", refuse)
    for number in (1, 2, 1):
        assert cache.get(block(number), trust) == content_of(block(number))
    cache.expect([(block(7), trust)])
    assert noting.begun() == [0, 1, 2]
    assert counts(cache) == (0, 3, 2, 3)
    assert [r.message for r in caplog.records if r.levelno >= logging.WARNING] == [
        f"cache folder {tmp_path / 'cache'} of at most 1000000 bytes: [Errno 28] No space left on "
        "device -> blocks that do not get in are fetched each time -> allow more bytes, or free "
        "the disk"
    ]
    assert look(tmp_path / "cache").num_bytes == BLOCK_BYTES


def test_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ValueError, match=r"cache folder .*cache -> cannot be used: "):
        make_cache(tmp_path, 1)
    with pytest.raises(ValueError, match=r"num_connections=0 -> nothing"):
        make_cache(tmp_path, 1, num_connections=0)
