import io
import pickle
import tarfile
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from datamodules.index import Index
from datamodules.reader import ShardReader
from datamodules.tar import BadSampleError, StoredSample, check_members, read_samples

LONG = "deep/" * 15 + "n" * 60
NAMES = [
    *("a/000.txt", "a/000.seg.PNG", "a/001.txt", "without_dot", "__meta__/x.txt", "__index__"),
    *("b.v2/002.txt", f"{LONG}/003.txt", f"{LONG}/003.cls", "ünïcode/004.txt", "l" * 120 + ".txt"),
]


def make_tar(kind: int) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=kind) as tar:
        for number, name in enumerate(NAMES):
            if kind == tarfile.USTAR_FORMAT and len(name) > 110 and "/" not in name:
                continue  # ustar has no room for it
            for file_type in (tarfile.DIRTYPE, tarfile.SYMTYPE):
                other = tarfile.TarInfo(f"other{number}.txt")
                other.type, other.linkname = file_type, "a/000.txt"
                tar.addfile(other)
            data = bytes([number]) * (number * 300)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return content.getvalue()


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_parser_agrees_with_webdataset(kind: int) -> None:
    tar = make_tar(kind)
    samples, error = read_samples(tar, 0, len(tar))
    assert error is None
    ours = [
        (s.key, {name: tar[at : at + size] for name, (at, size) in s.members.items()})
        for s in samples
    ]
    reference = [
        (s["__key__"], {name: value for name, value in s.items() if not name.startswith("__")})
        for s in group_by_keys(tar_file_expander([{"url": "a.tar", "stream": io.BytesIO(tar)}]))
    ]
    assert len(ours) >= 5
    assert ours == reference


def test_reader_finds_each_sample_in_any_sequence(
    make_dataset: Callable[..., Index], tmp_path: Path
) -> None:
    lengths = [[700, 900, 50, 3000], [2000], [10, 10, 10, 4000, 5]]
    index = make_dataset(tmp_path / "train", lengths)
    assert len(index.blocks) > 5
    reader = pickle.loads(pickle.dumps(ShardReader(index)))
    firsts = np.cumsum([0, *chain(*lengths)])
    for number in np.random.default_rng(0).permutation(10).tolist():
        region, dtype, offset, length = reader.array(number, "tokens.npy")
        tokens = np.frombuffer(reader.regions.view(region), dtype, length, offset)
        assert tokens.tolist() == list(range(firsts[number], firsts[number + 1]))


def test_reader_stays_within_its_bounds(
    make_dataset: Callable[..., Index], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datamodules.regions.OPEN_SHARDS", 2)
    monkeypatch.setattr("datamodules.reader.PARSED_BYTES", 99)
    reader = ShardReader(make_dataset(tmp_path / "train", [[100] * 4] * 5))
    for number in [*range(20), 3, 19]:
        reader.sample(number)
        assert len(reader.regions._shards) <= 2
        assert sum(block.num_bytes for block in reader._parsed.values()) <= 99


def test_headers_are_dropped_before_places(
    make_dataset: Callable[..., Index], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = make_dataset(tmp_path / "train", [[100] * 4] * 5)
    kept = ShardReader(index)
    expected = [kept.sample(number) for number in range(20)]
    assert all(block.samples for block in kept._parsed.values())
    monkeypatch.setattr("datamodules.reader.PARSED_BYTES", 5000)  # of some blocks, and all places
    reader, parsed = ShardReader(index), []
    read = read_samples
    monkeypatch.setattr(
        "datamodules.reader.read_samples",
        lambda tar, start, stop: parsed.append(stop - start) or read(tar, start, stop),
    )
    for number in [*range(20), *range(20)]:
        assert reader.sample(number) == expected[number]
    assert len(reader._parsed) == len(index.blocks)
    have_headers = [bool(block.samples) for block in reader._parsed.values()]
    assert have_headers == sorted(have_headers)  # those of the newest are left
    assert 0 < sum(have_headers) < len(have_headers)
    blocks = [size for size in parsed if size > expected[0][0].stop]
    assert len(blocks) == len(index.blocks)  # each is parsed once


def test_damaged_header_is_named(make_dataset: Callable[..., Index], tmp_path: Path) -> None:
    index = make_dataset(tmp_path / "train", [[100] * 4])
    shard = tmp_path / "train/train-000000.tar"
    content = bytearray(shard.read_bytes())
    content[5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"no tar header at byte 0 .*\(shard train-000000.tar,"):
        ShardReader(index).sample(1)


def test_other_shard_of_equal_size_is_refused(
    make_dataset: Callable[..., Index], tmp_path: Path
) -> None:
    index = make_dataset(tmp_path / "train", [[100] * 4])
    other = make_dataset(tmp_path / "other", [[10] * 2])
    content = (other.path / "train-000000.tar").read_bytes()
    shard = tmp_path / "train/train-000000.tar"
    shard.write_bytes(content.ljust(shard.stat().st_size, b"\0"))
    message = r"says 2 samples in the block at byte 4096, the shard holds 0 .*\(shard train-000000"
    with pytest.raises(ValueError, match=message):
        ShardReader(index).sample(3)


def test_member_that_is_not_as_the_schema_says_is_named(
    make_dataset: Callable[..., Index], tmp_path: Path
) -> None:
    index = make_dataset(tmp_path / "train", [[100] * 4])
    index.schema["tokens.npy"]["dtype"] = "uint32"
    reader = ShardReader(index)
    message = r"uint16\[100\] in 328 bytes, the schema says uint32 .*000000.tar, key 000001\)"
    try:
        with pytest.raises(ValueError, match=message):
            reader.array(1, "tokens.npy")
    finally:
        index.schema["tokens.npy"]["dtype"] = "uint16"


def test_sample_without_a_member_of_the_schema_is_refused() -> None:
    sample = StoredSample("1", 512, members={"a": (1024, 1)})
    check_members(sample, {"a": {}, "b": {"optional": "true"}})
    with pytest.raises(BadSampleError, match=r"byte 512 lacks \['b'\] of the schema"):
        check_members(sample, {"a": {}, "b": {}})


def test_member_that_comes_twice_is_refused() -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("0.a"))
    (sample,), _ = read_samples(content.getvalue(), 0, len(content.getvalue()))
    with pytest.raises(BadSampleError, match=r"two members 0\.a at byte 0"):
        check_members(sample, {"a": {}})
