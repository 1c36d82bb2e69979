import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from datamodules.index import Index, read_index, write_atomically


@pytest.fixture
def index(make_dataset: Callable[..., Index], tmp_path: Path) -> Index:
    return make_dataset(tmp_path / "train", [[100, 200], [300]])


def test_index_describes_its_shards(index: Index) -> None:
    assert [shard.num_samples for shard in index.shards] == [2, 1]
    assert index.lengths.tolist() == [100, 200, 300]
    assert index.blocks[:, 0].sum() == 3
    for shard in index.shards:
        assert Path(shard.url).stat().st_size == shard.num_bytes


def test_index_digest_changes_with_a_shard(
    index: Index, make_dataset: Callable[..., Index], tmp_path: Path
) -> None:
    assert make_dataset(tmp_path / "same", [[100, 200], [300]]).digest == index.digest
    assert make_dataset(tmp_path / "other", [[100, 200], [301]]).digest != index.digest


def test_shard_of_another_size_is_named_with_both_sizes(index: Index) -> None:
    shard = index.path / "train-000001.tar"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-512])
    message = rf"bytes in the index {size}, found {size - 512} .*\(shard train-000001.tar\)"
    with pytest.raises(ValueError, match=message):
        read_index(index.path)


def test_missing_shard_is_named(index: Index) -> None:
    (index.path / "train-000000.tar").unlink()
    with pytest.raises(ValueError, match=r"no such file .*\(shard train-000000.tar\)"):
        read_index(index.path)


def test_changed_table_is_refused(index: Index) -> None:
    np.array([100, 200, 301], "<u4").tofile(index.path / "lengths.u32")
    with pytest.raises(ValueError, match=r"lengths.u32 is not the table"):
        read_index(index.path)


def test_missing_table_and_index_are_refused(index: Index) -> None:
    (index.path / "blocks.u32").unlink()
    with pytest.raises(ValueError, match=r"blocks.u32 is missing"):
        read_index(index.path)
    (index.path / "index.json").unlink()
    with pytest.raises(ValueError, match=r"there is no index.json"):
        read_index(index.path)


def test_other_version_is_refused(index: Index) -> None:
    facts = json.loads((index.path / "index.json").read_bytes())
    (index.path / "index.json").write_text(json.dumps({**facts, "version": 99}))
    with pytest.raises(ValueError, match=r"version=99 -> this code reads version 2"):
        read_index(index.path)


@pytest.mark.parametrize(
    "content",
    [
        '{"version": 2, "shards": [{"raw_data": {}}]}',  # of mosaicml-streaming
        '{"chunks": [], "config": {}}',  # of litdata
        '{"__kind__": "wids-shard-index-v1", "shardlist": []}',  # of webdataset
        '{"version": 2, "sche',
    ],
)
def test_index_of_something_else_is_refused(content: str, index: Index) -> None:
    (index.path / "index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index.json: it is damaged or of another library -> "):
        read_index(index.path)


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    """As processes of equal numbers on two nodes would."""
    path, failures = tmp_path / "facts.json", []
    contents = [bytes([letter]) * 100_000 for letter in b"ab"]

    def write(content: bytes) -> None:
        for _ in range(50):
            try:
                write_atomically(path, content)
                assert path.read_bytes() in contents
            except (OSError, AssertionError) as err:
                failures.append(err)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
