import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from datamodules import block_cache, remote
from datamodules.node_disk import NodeDisk
from datamodules.remote import Fetcher, RemoteBlock
from tests.datamodules.cache_readers import (
    BLOCK_BYTES,
    NotingFetcher,
    block,
    content_of,
    counts,
    finish,
    look,
    make_cache,
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
    assert noting.begun() == [0, 1, 2, 3]
    assert counts(cache) == (0, 4, 2, 4)
    own = [record for record in caplog.records if record.name == "datamodules.node_disk"]
    assert [record.levelname for record in own] == ["WARNING"]
    assert "all that is in it is in use" in own[0].getMessage()
    del held


def test_room_ahead_is_not_looked_for_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache(tmp_path, 2, num_connections=1)
    held = [cache.get(block(number), trust) for number in (0, 1)]
    searches: list[int] = []

    def search(disk: NodeDisk, num_bytes: int) -> int:
        searches.append(num_bytes)
        return 2 * BLOCK_BYTES

    monkeypatch.setattr(NodeDisk, "_make_room", search)
    cache.expect([(block(number), trust) for number in range(2, 12)])
    wait_until(lambda: cache._own().num_threads == 0)
    # Not for each of ten: one thread gives up, perhaps before all are asked for, and then another.
    assert len(searches) <= 2
    del held


def test_blocks_without_room_are_kept_in_bounded_memory(
    tmp_path: Path, noting: NotingFetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_cache, "UNCACHED_BYTES", 2 * BLOCK_BYTES)
    cache = make_cache(tmp_path, 0.5)
    for number in (0, 1, 2, 1, 2):
        assert cache.get(block(number), trust) == content_of(block(number))
    assert noting.begun() == [0, 1, 2]
    cache.get(block(0), trust)
    assert noting.begun() == [0, 1, 2, 0]


@pytest.mark.parametrize(("max_blocks", "max_open"), [(6, 256), (100, 3)])
def test_process_keeps_what_it_used_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_blocks: int, max_open: int
) -> None:
    monkeypatch.setattr(block_cache, "OPEN_BLOCKS", max_open)
    cache = make_cache(tmp_path, max_blocks)  # half of the room is for used blocks
    for number in (0, 1, 2, 3, 1, 2, 3):
        cache.get(block(number), trust)
    assert counts(cache)[:2] == (0, 4)
    cache.get(block(0), trust)  # opened again
    assert counts(cache)[:2] == (1, 4)


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


def test_block_expected_again_stays_expected(tmp_path: Path, noting: NotingFetcher) -> None:
    cache = make_cache(tmp_path, 40, num_connections=1)
    for numbers in ([0, 1, 2], [1, 3]):
        cache.expect([(block(number), trust) for number in numbers])
    wait_until(lambda: look(tmp_path / "cache").num_done == 4)
    cache.get(block(3), trust)  # 0 and 2 have been passed
    ahead = cache._own().ahead
    assert [expected.offset // BLOCK_BYTES for expected in ahead] == [1]
    cache.get(block(1), trust)
    assert not ahead
    assert cache._own().ahead_bytes == 0


def test_requests_of_a_process_are_bounded(tmp_path: Path, noting: NotingFetcher) -> None:
    cache = make_cache(tmp_path, 100, num_connections=3)
    noting.shut()
    cache.expect([(block(number), trust) for number in range(10)])
    wait_until(lambda: len(noting.begun()) == 3)
    reader = threading.Thread(target=cache.get, args=(block(20), trust))
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
