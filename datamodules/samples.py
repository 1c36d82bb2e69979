"""Samples as they lie in shards, decoded one by one: images, pairs, or what others have written.

Whatever is random about a sample comes from its key, which is a function of (seed, epoch, its place
in the data set), so that ranks, workers and resume cannot change it: `datamodules.order.uniform`
gives numbers for it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from datamodules.block_cache import BlockCache
from datamodules.index import Index
from datamodules.meter import Counter, Row, new_row
from datamodules.order import Int64Array, hash_key, splitmix64
from datamodules.reader import RAISE, BadSamples, ShardReader

_AUGMENTATION = 5  # purpose of the key, next to those of `datamodules.order` and `rows`


class Codec(Protocol):
    """From stored members to batches; sent to worker processes."""

    def decode(self, members: Mapping[str, memoryview], key: np.uint64 | None) -> Any:
        """Make a sample of its members, extension -> content, valid until the next call.

        Args:
            members: the sample.
            key: of all that is random about it in this epoch; None in evaluation.

        Raises:
            ValueError: they cannot be decoded; the sample is then a bad one.
        """
        ...

    def collate(self, samples: Sequence[Any]) -> Any:
        """Make a batch of samples."""
        ...

    def pad(self, batch: Any, num_samples: int) -> None:
        """Turn the samples of a batch from `num_samples` on into ones that count for nothing."""
        ...


class StoredSamples:
    """The samples of a data set; a `datamodules.workers.SampleSource`.

    Args:
        index: of the data set.
        codec: makes batches of members.
        seed: key of what is random.
        bad_samples: what to do about samples that cannot be read.
        cache: of blocks of shards that are not local tars.

    Attributes:
        identity: what a position depends on, for the stream's state.
        samples_per_block: int64 [blocks].
        sample_bytes: mean size of a sample in its shard.

    Raises:
        ValueError: there are no samples.
    """

    def __init__(
        self,
        index: Index,
        codec: Codec,
        *,
        seed: int,
        bad_samples: BadSamples = RAISE,
        cache: BlockCache | None = None,
    ) -> None:
        self._codec, self._seed = codec, seed
        self._reader = ShardReader(index, bad_samples, cache)
        self.identity: dict[str, Any] = {"index_digest": index.digest}
        self.samples_per_block: Int64Array = index.blocks[:, 0].astype(np.int64)
        if not self.samples_per_block.any():
            raise ValueError(f"data set {index.path}: it has no samples -> give another one")
        num_samples = int(self.samples_per_block.sum())
        self.sample_bytes = max(1, int(index.blocks[:, 1].sum(dtype=np.int64)) // num_samples)
        self._first_sample = np.cumsum(self.samples_per_block) - self.samples_per_block
        self._row, self._bytes_read = new_row(), 0

    def count_into(self, row: Row) -> None:
        """Add what is read from now on to a row of `datamodules.meter`."""
        self._row = row
        self._reader.count_into(row)

    def expect(self, blocks: Int64Array) -> None:
        """Begin to fetch some blocks, int64 [n], in this order, where they are not local."""
        self._reader.regions.expect(blocks)

    def plan(
        self, epochs: Int64Array | None, blocks: Int64Array, samples: Int64Array
    ) -> Int64Array:
        """Resolve samples into (number in the data set, epoch or -1), int64 [n, 2]."""
        numbers = self._first_sample[blocks] + samples
        return np.stack([numbers, np.full_like(numbers, -1) if epochs is None else epochs], axis=1)

    def batches(self, addresses: Int64Array) -> Iterator[Any]:
        """Read planned batches [batches, micro_batch, 2]."""
        for planned in addresses:
            keys = self._keys(*planned.T)
            self._bytes_read = 0
            samples = list(map(self._read, planned[:, 0].tolist(), keys))
            self._row[Counter.SAMPLES] += len(samples)
            self._row[Counter.BYTES] += self._bytes_read
            yield self._codec.collate(samples)

    def pad(self, batch: Any, num_samples: int) -> None:
        """Turn the samples from `num_samples` on into ones that count for nothing."""
        self._codec.pad(batch, num_samples)

    def _read(self, number: int, key: np.uint64 | None) -> Any:
        return self._reader.read(number, lambda found: self._decode(found, key))

    def _decode(self, number: int, key: np.uint64 | None) -> Any:
        sample, region = self._reader.sample(number)
        content = self._reader.regions.view(region)
        members = {
            name: content[offset : offset + size] for name, (offset, size) in sample.members.items()
        }
        try:
            decoded = self._codec.decode(members, key)
        except ValueError as err:
            raise self._reader.error(number, f"its codec cannot decode it ({err})") from err
        self._bytes_read += sample.stop - sample.start
        return decoded

    def _keys(self, numbers: Int64Array, epochs: Int64Array) -> list[np.uint64 | None]:
        """Keys of samples, int64 [n] each, in one go: a call of numpy costs as much as a sample."""
        keys: list[np.uint64 | None] = [None] * len(numbers)
        for epoch in set(epochs.tolist()) - {-1}:
            own = np.flatnonzero(epochs == epoch)
            key = hash_key(self._seed, epoch, _AUGMENTATION)
            made = splitmix64(numbers[own].astype(np.uint64) ^ key)
            for place, value in zip(own.tolist(), made, strict=True):
                keys[place] = value
        return keys
