import errno
import logging
import mmap
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from datamodules import node_disk
from datamodules.node_disk import NodeDisk
from tests.datamodules.cache_readers import (
    BLOCK_BYTES,
    NotingFetcher,
    block,
    content_of,
    counts,
    finish,
    look,
    make_cache,
    read_and_hold,
    read_in_order,
    start,
    trust,
    wait_until,
)


@pytest.fixture
def noting(tmp_path: Path) -> NotingFetcher:
    return NotingFetcher(tmp_path)


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
    for cache in (reader, holder):
        held = cache.get(block(0), trust)
    for number in (1, 2, 3, 1, 3):
        reader.get(block(number), trust)
    assert noting.begun() == [0, 1, 2, 3]
    reader.get(block(4), trust)  # in the place of 2, as 0 is mapped and 1 was used again
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


def test_block_finished_by_another_meanwhile_is_taken(
    tmp_path: Path, noting: NotingFetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = NodeDisk._claim

    def claim_late(disk: NodeDisk, name: str) -> int | None:
        monkeypatch.setattr(NodeDisk, "_claim", claim)
        make_cache(tmp_path, 100).get(block(0), trust)
        return disk._claim(name)

    monkeypatch.setattr(NodeDisk, "_claim", claim_late)
    assert bytes(make_cache(tmp_path, 100).get(block(0), trust)) == content_of(block(0))
    assert noting.begun() == [0]
    assert look(tmp_path / "cache").num_parts == 0


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
    found = look(tmp_path / "cache")
    assert (found.num_bytes, found.noted_bytes) == (2 * BLOCK_BYTES, 2 * BLOCK_BYTES)
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
    wait_until(lambda: cache._own().num_threads == 0)
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
