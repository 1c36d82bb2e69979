"""Corrupted text for encoder-decoders: the rows of a text corpus as sources and targets.

Legend: B rows of a batch, L tokens of a row as it is stored, S and T tokens of source and target.

What is random about a row comes from a key of (seed, epoch, its number in the data set); in
evaluation of its number alone, so that all runs are scored on the same corruption.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from datamodules.batch import IGNORED, PairBatch
from datamodules.corruption import (
    OBJECTIVES,
    SPAN_CORRUPTION,
    Objective,
    PrefixLM,
    SpanCorruption,
    lengths_for,
)
from datamodules.index import Index
from datamodules.meter import Row
from datamodules.order import Int64Array, UInt64Array, hash_key, splitmix64
from datamodules.rows import TextRows
from datamodules.settings import check_choice
from datamodules.text import TextDataModule
from datamodules.workers import SampleSource

_CORRUPTION = 8  # purpose of the key, next to those of `order` to `samples`, `blend`, `pair_plan`


class CorruptedRows:
    """Rows of text, corrupted; a `datamodules.workers.SampleSource`.

    Args:
        rows: of L tokens, whose `inputs` are corrupted.
        objective: what is taken out of them.
        start_token: first input of the decoder.
        seed: key of the corruption in training.

    Attributes:
        identity: what a position in these rows depends on, for the stream's state.
        samples_per_block: int64 [chunks], rows of each chunk.
        sample_bytes: size of a row in its shard.
    """

    def __init__(
        self, rows: TextRows, objective: Objective, *, start_token: int, seed: int
    ) -> None:
        self._rows, self._objective = rows, objective
        self._start_token, self._seed = start_token, seed
        self.samples_per_block, self.sample_bytes = rows.samples_per_block, rows.sample_bytes
        self.identity: dict[str, Any] = {**rows.identity, **objective.identity}
        self._first_row = np.cumsum(self.samples_per_block) - self.samples_per_block

    def count_into(self, row: Row) -> None:
        """Add what is read from now on to a row of `datamodules.meter`."""
        self._rows.count_into(row)

    def expect(self, blocks: Int64Array) -> None:
        """Begin to fetch some chunks, int64 [n], in this order, where they are not local."""
        self._rows.expect(blocks)

    def plan(
        self, epochs: Int64Array | None, blocks: Int64Array, samples: Int64Array
    ) -> Int64Array:
        """Resolve rows into their addresses and keys, int64 [n, 4]."""
        keys = self._keys(epochs, blocks, samples)
        return np.column_stack([self._rows.plan(epochs, blocks, samples), keys.view(np.int64)])

    def count_targets(
        self, epochs: Int64Array, blocks: Int64Array, samples: Int64Array
    ) -> Int64Array:
        """Count the targets of rows, int64 [n]."""
        return self._objective.count_targets(self._keys(epochs, blocks, samples))

    def batches(self, addresses: Int64Array) -> Iterator[PairBatch]:
        """Read planned rows [batches, B, 4] and corrupt them."""
        keys = np.ascontiguousarray(addresses[..., 3]).view(np.uint64)
        for own_keys, batch in zip(keys, self._rows.batches(addresses[..., :3]), strict=True):
            yield self._corrupt(batch["inputs"].numpy(), own_keys)

    def pad(self, batch: PairBatch, num_samples: int) -> None:
        """Turn the rows from `num_samples` on into ones that predict nothing."""
        batch["targets"][num_samples:] = IGNORED

    def _keys(
        self, epochs: Int64Array | None, blocks: Int64Array, samples: Int64Array
    ) -> UInt64Array:
        numbers = (self._first_row[blocks] + samples).astype(np.uint64)
        if epochs is None:
            return splitmix64(numbers ^ hash_key(_CORRUPTION))
        keys = np.empty_like(numbers)
        for epoch in np.unique(epochs).tolist():
            own = epochs == epoch
            keys[own] = splitmix64(numbers[own] ^ hash_key(self._seed, epoch, _CORRUPTION))
        return keys

    def _corrupt(self, tokens: Int64Array, keys: UInt64Array) -> PairBatch:
        source, source_lengths, target, target_lengths = self._objective.corrupt(tokens, keys)
        source_mask = np.arange(source.shape[1]) < source_lengths[:, None]
        target_mask = np.arange(target.shape[1]) < target_lengths[:, None]
        start = np.full((len(target), 1), self._start_token)
        return PairBatch(
            source=torch.from_numpy(source),
            source_mask=torch.from_numpy(source_mask),
            inputs=torch.from_numpy(np.concatenate([start, target[:, :-1]], axis=1)),
            targets=torch.from_numpy(np.where(target_mask, target, IGNORED)),
        )


class DenoisingDataModule(TextDataModule):
    """Corrupted rows of a text corpus as `datamodules.batch.PairBatch`.

    Args:
        objective: `span_corruption` or `prefix_lm` (`datamodules.corruption`).
        source_length: longest source in tokens, the end token among them. Of `span_corruption` all
            sources have it or a token less, and all targets one length (`lengths_for`); targets of
            `prefix_lm` are as long at most.
        noise_density: share of a row's tokens that `span_corruption` takes out.
        mean_span_length: of its spans, in tokens.
        corpus_stream: the rest, as in `datamodules.corpus_stream.CorpusDataModule`.
    """

    def __init__(
        self,
        *,
        objective: str,
        source_length: int,
        noise_density: float,
        mean_span_length: float,
        **corpus_stream: Any,
    ) -> None:
        check_choice("objective", objective, OBJECTIVES)
        if source_length < 2:
            raise ValueError(
                f"datamodule.source_length={source_length} -> its end token is one of them -> use "
                "2 or more"
            )
        self._objective, self._source_length = objective, source_length
        self._noise = {"density": noise_density, "mean_span": mean_span_length}
        # A prefix leaves a token to its target at least, whose place its end token takes.
        self._row_length = source_length
        if objective == SPAN_CORRUPTION:
            self._row_length, _ = lengths_for(source_length, **self._noise)
        super().__init__(
            sequence_length=self._row_length, packing="cut", document_mask=False, **corpus_stream
        )

    def samples_of(self, split: str, index: Index) -> SampleSource:
        """Give the corrupted rows of a data set.

        Raises:
            ValueError: the corpus has no end token, too few sentinels, or no text of a row's size.
        """
        if (longest := int(index.lengths.max())) <= self._row_length:
            raise ValueError(
                f"datamodule.source_length={self._source_length} -> rows have {self._row_length} "
                f"tokens, and the longest chunk of {index.path} has {longest} -> lower it, or take "
                "a larger corpus or split"
            )
        objective = self._make_objective()
        rows = super().samples_of(split, index)
        assert isinstance(rows, TextRows)  # they are cut
        start_token = self.facts.get("start_token")
        return CorruptedRows(
            rows,
            objective,
            start_token=self.facts["end_token"] if start_token is None else start_token,
            seed=self._seed,
        )

    def _make_objective(self) -> Objective:
        end_token = self.facts["end_token"]
        if end_token is None:
            raise ValueError(
                f"datamodule.objective={self._objective} -> the corpus is one document and has no "
                "end token, which sources and targets end with -> prepare a folder or records"
            )
        if self._objective == SPAN_CORRUPTION:
            sentinels = self.facts.get("sentinels", [])
            return SpanCorruption(
                self._row_length, **self._noise, sentinels=sentinels, end_token=end_token
            )
        return PrefixLM(self._row_length, end_token=end_token)
