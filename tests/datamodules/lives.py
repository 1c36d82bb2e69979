"""Runs over samples that are numbers, whose process groups are killed and replaced."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from datamodules.loader import TrainLoader, order_of
from datamodules.meter import Row
from datamodules.order import Int64Array

PADDING = -1
EPOCHS = 3


class Numbers:
    """Samples that are their numbers in the data set; a `SampleSource` that notes what is read."""

    def __init__(self, samples_per_block: list[int]) -> None:
        self.samples_per_block = np.array(samples_per_block)
        self.sample_bytes = 1024
        self.identity: dict[str, Any] = {}
        self.blocks_read: set[int] = set()

    def expect(self, blocks: Int64Array) -> None:
        pass

    def count_into(self, row: Row) -> None:
        pass

    def plan(self, epochs: Int64Array | None, blocks: Int64Array, samples: Int64Array) -> Any:
        self.blocks_read |= set(blocks.tolist())
        assert (samples < self.samples_per_block[blocks]).all()
        return (
            np.cumsum(self.samples_per_block)[blocks] - self.samples_per_block[blocks]
        ) + samples

    def batches(self, addresses: Int64Array) -> Iterator[list[int]]:
        yield from addresses.tolist()

    def pad(self, batch: list[int], num_samples: int) -> None:
        batch[num_samples:] = [PADDING] * (len(batch) - num_samples)


@dataclass
class Life:
    """One process group of a run: what it was started with, and when it is killed."""

    world: int
    micro_batch: int
    workers: int
    killed_after: int | None = None  # micro-batches handed over on each rank; None at the end


@dataclass
class Case:
    """A data set, a run over it, and how often that is interrupted."""

    blocks: list[int]
    batch_samples: int
    window_mb: float
    tail: str
    seed: int
    lives: list[Life] = field(default_factory=list)

    @property
    def num_samples(self) -> int:
        return sum(self.blocks)

    @property
    def samples_per_epoch(self) -> int:
        steps, rest = divmod(self.num_samples, self.batch_samples)
        whole = steps * self.batch_samples
        return {
            "drop": whole,
            "carry": self.num_samples,
            "pad_mask": whole + self.batch_samples * (rest > 0),
        }[self.tail]

    @property
    def max_samples(self) -> int:
        return -(-EPOCHS * self.samples_per_epoch // self.batch_samples) * self.batch_samples


def make_loader(case: Case, life: Life, rank: int, source: Numbers | None = None) -> TrainLoader:
    source = source or Numbers(case.blocks)
    order = order_of(
        source,
        seed=case.seed,
        batch_samples=case.batch_samples,
        window_mb=case.window_mb,
        tail=case.tail,
    )
    return TrainLoader(
        source,
        order,
        batch_samples=case.batch_samples,
        micro_batch=life.micro_batch,
        max_samples=case.max_samples,
        num_workers=life.workers,
        repeat_first_batch=False,
        rank=rank,
        world_size=life.world,
    )


def live(case: Case, life: Life, state: dict[str, Any] | None) -> tuple[list[int], dict[str, Any]]:
    """Samples of the optimizer steps that a life completes, in global order, and its last state."""
    by_rank, states = [], []
    for rank in range(life.world):
        loader = make_loader(case, life, rank)
        if state is not None:
            loader.restore(state)
        start = loader.position
        samples = [sample for batch in islice(loader, life.killed_after) for sample in batch]
        by_rank.append(samples[: (loader.position - start) // life.world])
        states.append(loader.stream_state())
    assert all(own == states[0] for own in states)
    return np.array(by_rank).T.reshape(-1).tolist(), states[0]


def run(case: Case, lives: list[Life] | None = None) -> list[int]:
    samples, state = [], None
    for life in lives or case.lives:
        own, state = live(case, life, state)
        samples += own
    return samples


def uninterrupted(case: Case) -> list[int]:
    return run(case, [Life(1, case.batch_samples, 0)])
