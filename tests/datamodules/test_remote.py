import gzip
import os
import pickle
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from datamodules import remote
from datamodules.index import digest_bytes
from datamodules.remote import Fetcher, RemoteBlock, is_remote, is_sequential
from tests.datamodules.object_store import BUCKET, ObjectStore

CONTENT = random.Random(0).randbytes(300_000)
PASSING = ["unavailable", "slow", "reset", "truncated", "corrupt"]


@pytest.fixture(scope="session")
def store() -> Iterator[ObjectStore]:
    store = ObjectStore()
    yield store
    store.close()


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)


def make_fetcher(options: dict[str, Any], timeout_s: float = 60.0) -> Fetcher:
    return Fetcher(storage_options=options, max_attempts=3, timeout_s=timeout_s)


@pytest.fixture(scope="session")
def fetchers(store: ObjectStore) -> dict[str, Fetcher]:
    """By scheme; shared, because connecting to S3 takes half a second."""
    return {"s3": make_fetcher(store.options), "http": make_fetcher({})}


def check(content: memoryview) -> None:
    if bytes(content) != CONTENT[1000 : 1000 + len(content)]:
        raise ValueError(f"digest {digest_bytes(content)} -> not that of the index -> fetch again")


@pytest.mark.parametrize(
    ("url", "remote", "sequential"),
    [
        ("s3://b/a.tar", True, False),
        ("gs://b/a.tar", True, False),
        ("https://h/a.tar", True, False),
        ("https://h/a.tar.gz?signature=x.tar", True, True),
        ("s3://b/a.tgz", True, True),
        ("pipe:cat a.tar", True, True),
        ("/data/a.tar", False, False),
        ("a.tar.gz", False, True),
    ],
)
def test_urls_are_told_apart(url: str, remote: bool, sequential: bool) -> None:
    assert is_remote(url) == remote
    assert is_sequential(url) == sequential


@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_ranges_are_exact(store: ObjectStore, fetchers: dict[str, Fetcher], scheme: str) -> None:
    url = store.put("exact.tar", CONTENT)
    if scheme == "http":
        url = f"{store.endpoint}/{BUCKET}/exact.tar"
    fetcher = fetchers[scheme]
    for start, stop in [(0, 1), (1000, 66_536), (299_999, 300_000), (0, 300_000)]:
        block = RemoteBlock(url, start, stop - start, "")
        assert fetcher.fetch(block) == CONTENT[start:stop]
    assert pickle.loads(pickle.dumps(fetcher)).fetch(block) == CONTENT


@pytest.mark.parametrize(
    ("scheme", "fault"),
    [*((scheme, fault) for scheme in ("s3", "http") for fault in PASSING), ("http", "too_many")],
)
def test_failure_that_passes_is_tried_again(
    store: ObjectStore,
    fetchers: dict[str, Fetcher],
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
    fault: str,
) -> None:
    key = f"{scheme}-{fault}.tar"
    url = store.put(key, CONTENT)
    if scheme == "http":
        url = f"{store.endpoint}/{BUCKET}/{key}"
    fetcher = fetchers[scheme]
    block = RemoteBlock(url, 1000, 50_000, "")
    assert fetcher.fetch(block) == CONTENT[1000:51_000]
    store.faults[key] = [fault]
    retries: list[int] = []

    def on_retry() -> None:
        monkeypatch.setattr(fetcher, "_timeout_s", 60.0)
        retries.append(1)

    if fault == "slow":
        monkeypatch.setattr(fetcher, "_timeout_s", 0.5)
    assert fetcher.fetch(block, check, on_retry) == CONTENT[1000:51_000]
    assert store.reads[key] == 3
    # aiohttp itself repeats what was sent on a kept connection that turns out to be closed.
    assert len(retries) == (fault != "reset")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("unavailable", "reduce your rate"),
        ("reset", "Connection"),
        ("truncated", "not completed"),
        ("corrupt", "digest .* not that of the index"),
    ],
)
def test_failure_that_stays_is_told_with_its_cause(
    store: ObjectStore, fetchers: dict[str, Fetcher], fault: str, message: str
) -> None:
    url = store.put(f"always-{fault}.tar", CONTENT)
    store.faults[f"always-{fault}.tar"] = [fault] * 100
    with pytest.raises(ValueError, match=f"(?s){url}: .* byte 1000 .*{message}.* of 3 attempts"):
        fetchers["s3"].fetch(RemoteBlock(url, 1000, 50_000, ""), check)


def test_slow_answers_do_not_hang(
    store: ObjectStore, fetchers: dict[str, Fetcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = store.put("hangs.tar", CONTENT)
    block = RemoteBlock(url, 0, 1000, "")
    fetchers["s3"].fetch(block)
    monkeypatch.setattr(fetchers["s3"], "_timeout_s", 0.3)
    store.faults["hangs.tar"] = ["slow"] * 3
    with pytest.raises(ValueError, match=r"no answer within 0.3 s, at the last of 3 attempts"):
        fetchers["s3"].fetch(block)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://shards/none.tar", "none.tar: .*FileNotFoundError"),
        ("HTTP/shards/none.tar", "none.tar: .*FileNotFoundError"),
        ("HTTP/shards/none.tar.gz", "none.tar.gz: .* 404"),
        ("s3://shards/denied.tar", "denied.tar: .*PermissionError: Access Denied"),
        ("HTTP/shards/denied.tar", "denied.tar: .* 403"),
        ("unheard://a/b.tar", "Protocol not known: unheard"),
        ("memory://a/b.tar", "no time limit"),
        ("missing.tar.gz", "missing.tar.gz: .*FileNotFoundError"),
    ],
)
def test_what_cannot_get_better_is_told_at_once(
    store: ObjectStore, fetchers: dict[str, Fetcher], url: str, message: str
) -> None:
    store.put("denied.tar", CONTENT)
    store.faults["denied.tar"] = ["forbidden"]  # a second attempt would succeed
    retries: list[int] = []
    with pytest.raises(ValueError, match=message):
        fetchers["s3" if url.startswith("s3") else "http"].fetch(
            RemoteBlock(url.replace("HTTP", store.endpoint), 0, 1000, ""),
            on_retry=lambda: retries.append(1),
        )
    assert not retries


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(scheme: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(remote.fsspec, "get_filesystem_class", not_installed)
    with pytest.raises(ValueError, match=r"pip install 'trainyard\[s3\]'"):
        make_fetcher({}).fetch(RemoteBlock("s3://shards/a.tar", 0, 1, ""))


def test_server_without_ranges_is_refused(store: ObjectStore) -> None:
    store.put("whole.tar", CONTENT)
    store.faults["whole.tar"] = ["whole"]
    url = f"{store.endpoint}/{BUCKET}/whole.tar"
    with pytest.raises(ValueError, match=r"all of the file where a part was asked for"):
        make_fetcher({}).fetch(RemoteBlock(url, 1000, 1000, ""))


@pytest.mark.parametrize("fault", [[], ["truncated"], ["unavailable"]])
@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_gzipped_tar_is_read_in_ranges(
    store: ObjectStore,
    fetchers: dict[str, Fetcher],
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
    fault: list[str],
) -> None:
    monkeypatch.setattr(remote, "PIECE_BYTES", 70_000)
    key = f"{scheme}-{'-'.join(fault)}.tar.gz"
    url = store.put(key, gzip.compress(CONTENT))
    if scheme == "http":
        url = f"{store.endpoint}/{BUCKET}/{key}"
    store.faults[key] = list(fault)
    assert fetchers[scheme].fetch(RemoteBlock(url, 0, len(CONTENT), "")) == CONTENT
    assert store.reads[key] >= 5
    assert not store.faults[key]


def test_commands_and_local_files_are_read_to_their_end(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.tar", tmp_path / "b.tar.gz"
    plain.write_bytes(CONTENT)
    packed.write_bytes(gzip.compress(CONTENT[:1000]) + gzip.compress(CONTENT[1000:]))
    fetcher = make_fetcher({})
    for url in [f"pipe:cat {plain}", f"pipe:cat {packed}", f"pipe:zcat {packed}", str(packed)]:
        assert fetcher.fetch(RemoteBlock(url, 0, len(CONTENT), "")) == CONTENT


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("cat FILE; exit 3", "OSError: `cat .*exit 3` ended with status 3"),
        ("cat FILE FILE", "300000 and more of 300000 bytes came"),
        ("head -c 1000 FILE", "1000 of 300000 bytes came"),
        ("cat FILE; sleep 60", "no output of `cat .*; sleep 60` for 0.3 s"),
        ("gzip < FILE | head -c 1000", "EOFError"),
    ],
)
def test_command_that_fails_is_named(tmp_path: Path, command: str, message: str) -> None:
    (tmp_path / "a.tar").write_bytes(CONTENT)
    url = f"pipe:{command.replace('FILE', str(tmp_path / 'a.tar'))}"
    with pytest.raises(ValueError, match=f"(?s){message}.* of 3 attempts"):
        make_fetcher({}, 0.3 if "sleep" in command else 60.0).fetch(
            RemoteBlock(url, 0, len(CONTENT), "")
        )


def test_command_is_ended_with_all_it_started(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    url = f"pipe:sh -c 'echo $$ > {note}; echo started; exec sleep 60'; true"
    with pytest.raises(ValueError, match="1 and more of 1 bytes"):
        Fetcher(storage_options={}, max_attempts=1, timeout_s=60.0).fetch(
            RemoteBlock(url, 0, 1, "")
        )
    pid = int(note.read_text())
    for _ in range(200):  # until whoever adopted it has seen it end
        try:
            status = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            break
        if status.rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.01)
    else:
        os.kill(pid, 9)
        pytest.fail("the command's child lives on")


def test_waits_double_at_most_and_differ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    waits: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.5)
    monkeypatch.setattr(remote, "LONGEST_WAIT_S", 4.0)
    fetcher = Fetcher(storage_options={}, max_attempts=200, timeout_s=5.0)
    (tmp_path / "a.tar.gz").write_bytes(b"short")
    with pytest.raises(ValueError, match="of 200 attempts"):
        fetcher.fetch(RemoteBlock(str(tmp_path / "a.tar.gz"), 0, 10, ""))
    assert len(waits) == 199
    bounds = [min(4.0, 0.5 * 2**attempt) for attempt in range(199)]
    assert all(0 <= wait <= bound for wait, bound in zip(waits, bounds, strict=True))
    assert 1.6 < sum(waits[3:]) / 196 < 2.4  # uniform: 2, with a standard error of 0.08


def test_at_least_one_attempt_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"max_attempts=0 -> "):
        Fetcher(storage_options={}, max_attempts=0, timeout_s=1.0)
