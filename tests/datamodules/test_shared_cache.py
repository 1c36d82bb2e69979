"""Training and evaluation of one run that share the cache of a node."""

import gzip
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.foreign import index_shards
from datamodules.index import read_index
from datamodules.samples import StoredSamples
from datamodules.stream import StreamDataModule
from datamodules.write import ShardWriter

SHARDS, SAMPLES, SIZE = 24, 8, 4000


class FirstByte:
    """A codec of samples: their first byte."""

    def decode(self, members: Mapping[str, memoryview], key: np.uint64 | None) -> int:
        return members["bin"][0]

    def collate(self, samples: Sequence[int]) -> list[int]:
        return list(samples)

    def pad(self, batch: list[int], num_samples: int) -> None:
        del batch[num_samples:]


class Compressed(StreamDataModule):
    """Samples of compressed shards, a block each, in folders by split."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self._folder = folder
        super().__init__(**settings)

    def source(self, split: str) -> StoredSamples:
        index = read_index(self._folder / split)
        return StoredSamples(index, FirstByte(), seed=0, cache=self.cache_for(index))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compressed")
    for split in ("train", "val"):
        (folder / split).mkdir()
        for number in range(SHARDS):
            with ShardWriter(plain := folder / "plain.tar") as writer:
                for _ in range(SAMPLES):
                    writer.write(SIZE, {"bin": bytes([number]) * SIZE})
                writer.finish()
            packed = gzip.compress(plain.read_bytes())
            (folder / split / f"{number:02d}.tar.gz").write_bytes(packed)
        index_shards(str(folder / split), None, 1)
    return folder


# Python 3.12 and later say so of every fork after torch's threads have started.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_and_training_find_room_beside_each_other(
    workers: int, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    block = int(read_index(folder / "train").blocks[:, 1].max())
    cache = {
        **{"folder": str(tmp_path), "gb": 17 * block / 2**30, "num_connections": 2},
        **{"max_attempts": 1, "timeout_s": 60, "storage_options": {}},
    }
    data = Compressed(
        folder,
        **{"batch_samples": 4, "micro_batch": 4, "max_samples": 1200, "num_workers": workers},
        **{"repeat_first_batch": False, "window_mb": 0.01, "tail": "drop", "seed": 0},
        **{"val_max_samples": None, "on_bad_sample": "raise", "max_bad_samples": 0},
        cache=cache,
    )
    training = iter(data.train_dataloader())
    list(islice(training, 100))  # as many blocks as it may have
    before = data.counters()
    numbers = [number for batch in data.val_dataloader() for number in batch]
    assert numbers == [number for number in range(SHARDS) for _ in range(SAMPLES)]
    if not workers:
        assert data.counters()["cache_misses"] == before["cache_misses"]  # evaluation's are not
    assert len(list(training)) == 200
    after = data.counters()
    assert after["cache_misses"] + after["cache_hits"] > before["cache_misses"] + SHARDS
    assert after["uncached"] == 0
    assert not caplog.records  # of blocks that evaluation found no room for
