import gc
import gzip
import io
import json
import random
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from webdataset.compat import WebDataset

from datamodules import foreign
from datamodules.block_cache import BlockCache
from datamodules.foreign import index_shards, list_shards
from datamodules.index import Index, digest_file, read_index
from datamodules.reader import ShardReader
from datamodules.remote import Fetcher
from datamodules.tar import BadSampleError

ROOT = Path(__file__).parents[2]
Members = list[tuple[str, bytes]]


def write_tar(path: Path, members: Members, tar_format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            if name.endswith("/"):
                entry.type = tarfile.DIRTYPE
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def make_members(seed: int, num_samples: int = 8) -> Members:
    """Samples with long and unicode names, one of which lacks a member, and what is none."""
    rng = random.Random(seed)
    keys = [f"{seed}/{number:04d}" for number in range(num_samples)]
    keys[2] = f"{seed}/" + "/".join("long-name" * 4 for _ in range(6)) + "/deep"
    keys[3] = f"{seed}/bild-äö-日本-🙂"
    members: Members = [(f"{seed}/", b""), ("__meta__/info.json", b"{}"), ("README", b"no dot")]
    for number, key in enumerate(keys):
        members.append((f"{key}.JPG", rng.randbytes(rng.randint(1, 3000))))
        members.append((f"{key}.json", json.dumps({"number": number}).encode()))
        if number != 5:
            members.append((f"{key}.seg.png", rng.randbytes(700)))
        if number == 6:
            members.append(("__notes__/a.txt", b"between two samples"))
    return members


def read_ours(index: Index, cache: BlockCache | None = None) -> list[dict[str, bytes | str]]:
    reader, samples = ShardReader(index, cache=cache), []
    for number in range(len(index.lengths)):
        sample, region = reader.sample(number)
        content = reader.regions.view(region)
        members = {name: bytes(content[at : at + n]) for name, (at, n) in sample.members.items()}
        samples.append({"__key__": sample.key, **members})
    return samples


def read_theirs(paths: list[Path]) -> list[dict[str, bytes | str]]:
    stream: Any = WebDataset([str(path) for path in paths], shardshuffle=False)
    samples = [
        {name: value for name, value in sample.items() if name == "__key__" or name[:2] != "__"}
        for sample in stream
    ]
    del stream
    gc.collect()
    return samples


# webdataset leaves its last shard open, which is seen when the garbage is collected.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_stock_webdataset_and_our_reader_see_the_same_samples(
    tar_format: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign, "BLOCK_BYTES", 8192)
    paths = [write_tar(tmp_path / f"{n}.tar", make_members(n), tar_format) for n in range(3)]
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}
    assert index_shards(str(tmp_path), None, 1) == tmp_path
    index = read_index(tmp_path)
    assert len(index.blocks) > len(paths) == len(index.shards)
    theirs = read_theirs(paths)
    assert len(theirs) == 24
    assert read_ours(index) == theirs
    assert index.lengths.tolist() == [
        sum(len(content) for name, content in sample.items() if name != "__key__")
        for sample in theirs
    ]
    assert index.schema == {
        "jpg": {"codec": "jpg"},
        "json": {"codec": "json"},
        "seg.png": {"codec": "png", "optional": "true"},
    }
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths} == before
    assert not list(tmp_path.glob("*.tmp"))


def test_index_tells_damage_that_came_later(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", make_members(0))
    index_shards(str(path), None, 1)
    content = bytearray(path.read_bytes())
    content[content.index(b'{"number": 4}') + 11] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadSampleError, match=r"not as it was written .*key 0/0004"):
        read_ours(read_index(tmp_path))


def test_index_elsewhere_finds_the_shards(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    paths = [write_tar(tmp_path / name, make_members(1)) for name in ("b/0.tar", "a/1.tar")]
    folder = index_shards([str(path) for path in paths], str(tmp_path / "out"), 1)
    samples = read_ours(read_index(folder))
    assert [Path(shard.url) for shard in read_index(folder).shards] == paths
    assert not list(tmp_path.glob("[ab]/*.json"))
    index_shards(f"{tmp_path}/**/*.tar", None, 1)
    assert [Path(s.url).name for s in read_index(tmp_path).shards] == ["1.tar", "0.tar"]
    assert sorted(map(str, read_ours(read_index(tmp_path)))) == sorted(map(str, samples))


def test_index_of_other_shards_of_equal_names_and_sizes_is_written_anew(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "0.tar", make_members(1))
    out = str(tmp_path / "out")
    for name in ("a", "b"):
        (shard,) = read_index(index_shards(str(tmp_path / name), out, 1)).shards
        assert Path(shard.url) == tmp_path / name / "0.tar"


def test_index_of_another_library_is_left_alone(tmp_path: Path) -> None:
    write_tar(tmp_path / "[0].tar", make_members(1))
    (tmp_path / "index.json").write_text(theirs := '{"__kind__": "wids-shard-index-v1"}')
    with pytest.raises(ValueError, match=r"of another library -> .* index= out=\)"):
        index_shards(str(tmp_path), None, 1)
    assert (tmp_path / "index.json").read_text() == theirs
    folder = index_shards(str(tmp_path / "[0].tar"), str(tmp_path / "out"), 1)
    assert len(read_ours(read_index(folder))) == 8


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_compressed_shard_is_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "BLOCK_BYTES", 4096)
    names, archives = ("0.tar.gz", "1.tgz"), []
    for number, name in enumerate(names):
        archives.append(write_tar(tmp_path / "plain", make_members(number)).read_bytes())
        (tmp_path / name).write_bytes(gzip.compress(archives[-1]))
    index_shards(str(tmp_path), None, 1)
    index = read_index(tmp_path)
    assert index.blocks.tolist() == [[8, len(archive)] for archive in archives]
    assert [shard.digest for shard in index.shards] == [digest_file(tmp_path / n) for n in names]
    fetcher = Fetcher(storage_options={}, max_attempts=1, timeout_s=10)
    cache = BlockCache(
        tmp_path / "cache", max_bytes=2**24, num_readers=1, num_connections=1, fetcher=fetcher
    )
    theirs = read_theirs([tmp_path / name for name in names])
    assert read_ours(index, cache) == theirs
    assert len(theirs) == 16


def test_bytes_do_not_depend_on_processes(tmp_path: Path) -> None:
    for number in range(4):
        write_tar(tmp_path / f"{number}.tar", make_members(number))
    one = index_shards(str(tmp_path), str(tmp_path / "one"), 1)
    two = index_shards(str(tmp_path), str(tmp_path / "two"), 2)
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    assert "index.json" in names
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


KILLED = """
import os, signal, sys
from datamodules import foreign

write, count = foreign.write_atomically, 0

def write_or_die(path, content):
    global count
    count += 1
    if count == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, content)

foreign.write_atomically = write_or_die
foreign.index_shards(sys.argv[1], None, 1)
"""


def test_killed_indexing_is_finished_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write_tar(tmp_path / f"{n}.tar", make_members(n)) for n in range(6)]
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob("index.units/*.json"))) == 3
    write_tar(paths[1], make_members(1, num_samples=7))  # changed meanwhile
    read: list[str] = []
    open_archive = foreign.open_archive
    monkeypatch.setattr(foreign, "open_archive", lambda p: read.append(p.name) or open_archive(p))
    index_shards(str(tmp_path), None, 1)
    assert read == ["1.tar", "3.tar", "4.tar", "5.tar"]
    assert len(read_ours(read_index(tmp_path))) == 6 * 8 - 1
    assert not (tmp_path / "index.units").exists()
    index_shards(str(tmp_path), None, 1)
    assert len(read) == 4  # it is there
    paths.append(write_tar(tmp_path / "6.tar", make_members(6)))
    index_shards(str(tmp_path), None, 1)
    assert len(read_index(tmp_path).shards) == len(paths)
    write_tar(paths[1], make_members(1, num_samples=20))
    index_shards(str(tmp_path), None, 1)
    assert len(read_ours(read_index(tmp_path))) == 6 * 8 + 20


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("key again", r"second sample of the same key at byte \d+ -> .*shard 0.tar, key 0/0000\)"),
        ("member again", r"two members 0/0000.JPG at byte \d+ -> .*shard 0.tar, key 0/0000\)"),
        ("cut in a member", r"passes the end at byte \d+ -> .*shard 0.tar, behind key 0/0007\)"),
        ("cut in a header", r"no tar header at byte \d+ -> .*shard 0.tar, behind key 0/0007\)"),
        ("no end", r"no end-of-archive block at byte \d+ -> .*shard 0.tar, behind key 0/0007\)"),
        ("no tar", r"no tar header at byte 0 -> .*shard 0.tar, before the first key\)"),
        ("empty", r"0.tar -> the file is empty"),
    ],
)
def test_damaged_shards_are_named(harm: str, message: str, tmp_path: Path) -> None:
    members = make_members(0)
    if harm == "key again":
        members.append((members[3][0].replace("JPG", "txt"), b""))
    if harm == "member again":
        members.insert(4, members[3])
    content = write_tar(path := tmp_path / "0.tar", members).read_bytes()
    end = content.rindex(members[-1][1]) + 1024  # 700 bytes, filled up
    stops = {"cut in a member": end - 600, "cut in a header": end - 1100, "no end": end, "empty": 0}
    path.write_bytes(b"x" * 1024 if harm == "no tar" else content[: stops.get(harm)])
    with pytest.raises(ValueError, match=message):
        index_shards(str(path), None, 1)
    assert not (tmp_path / "index.json").exists()


def test_damaged_gzip_is_named(tmp_path: Path) -> None:
    content = gzip.compress(write_tar(tmp_path / "plain.tar", make_members(0)).read_bytes())
    (tmp_path / "0.tar.gz").write_bytes(content[:-20])
    with pytest.raises(ValueError, match=r"0.tar.gz -> cannot be decompressed after \d+ bytes"):
        index_shards(str(tmp_path / "0.tar.gz"), None, 1)


def test_shards_are_listed_by_name_and_lists_as_they_are(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar.gz", "c.txt"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in list_shards(str(tmp_path))] == ["a.tar.gz", "b.tar"]
    both = [str(tmp_path / "b.tar"), f"{tmp_path}/a*"]
    assert [path.name for path in list_shards(both)] == ["b.tar", "a.tar.gz"]
    with pytest.raises(ValueError, match=r"index=.*none\*.tar -> there is no shard"):
        list_shards(str(tmp_path / "none*.tar"))
    with pytest.raises(ValueError, match=r"index=s3://a/b.tar -> .* where a copy .* is local"):
        list_shards([str(tmp_path / "b.tar"), "s3://a/b.tar"])
    with pytest.raises(ValueError, match=r"names .*b.tar more than once -> "):
        list_shards([*both, str(tmp_path)])
