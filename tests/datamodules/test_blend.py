"""Several data sets in one stream: quotas, seeking, epochs and lanes of each."""

import random

import numpy as np
import pytest

from datamodules import blend
from datamodules.blend import BlendOrder
from datamodules.loader import order_of
from datamodules.order import Int64Array, Places
from tests.datamodules.lives import Numbers

LANES, SLOTS = 6, 100
BLOCKS = {"a": [40, 0, 33, 28, 7], "b": [9] * 20, "c": [11]}
WEIGHTS = {"a": 5.0, "b": 2.7, "c": 0.3}


@pytest.fixture(autouse=True)
def few_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blend, "SLOTS", SLOTS)


def make_order(
    weights: dict[str, float] = WEIGHTS, tail: str = "drop", seed: int = 1, window_mb: float = 0.02
) -> BlendOrder:
    orders = {
        name: order_of(
            Numbers(BLOCKS[name]),
            seed=seed,
            batch_samples=LANES,
            window_mb=window_mb,
            tail=tail,
            in_blend=True,
        )
        for name in weights
    }
    return BlendOrder(orders, weights, {n: len(BLOCKS[n]) for n in weights}, seed=seed)


def sources_of(places: Places) -> Int64Array:
    """Number of the data set of each sample."""
    ends = np.cumsum([len(BLOCKS[name]) for name in WEIGHTS])
    return np.searchsorted(ends, places.blocks, side="right")


@pytest.mark.parametrize("seed", range(5))
def test_quotas_are_exact_in_every_lane(seed: int) -> None:
    rng = random.Random(seed)
    weights = {name: rng.uniform(0.1, 3) for name in WEIGHTS}
    shares = np.array([*weights.values()]) / sum(weights.values())
    sources = sources_of(make_order(weights, seed=seed).locate(np.arange(5 * SLOTS * LANES)))
    for lane in range(LANES):
        for num_blocks in range(1, 6):
            own = sources.reshape(-1, LANES)[: num_blocks * SLOTS, lane]
            counts = np.bincount(own, minlength=3)
            assert (abs(counts - shares * num_blocks * SLOTS) < 1).all()


def test_slots_of_lanes_and_blocks_are_drawn_apart() -> None:
    sources = sources_of(make_order().locate(np.arange(2 * SLOTS * LANES)))
    orders = sources.reshape(2, SLOTS, LANES).transpose(0, 2, 1).reshape(-1, SLOTS).tolist()
    assert len({tuple(order) for order in orders}) == 2 * LANES
    assert orders != [sorted(order) for order in orders]


def as_rows(places: Places) -> list[list[int]]:
    return np.stack([places.epochs, places.blocks, places.samples], axis=1).tolist()


def test_any_position_is_found_alone() -> None:
    reference = as_rows(make_order().locate(np.arange(3 * SLOTS * LANES)))
    positions = np.random.default_rng(0).integers(0, len(reference), 100)
    order = make_order()
    assert as_rows(order.locate(positions)) == [reference[p] for p in positions]
    assert as_rows(make_order().locate(positions[-1:])) == [reference[positions[-1]]]
    assert as_rows(make_order(seed=2).locate(np.arange(len(reference)))) != reference


@pytest.mark.parametrize("tail", ["drop", "carry"])
def test_each_data_set_has_its_own_epochs(tail: str) -> None:
    order, num_blocks = make_order(tail=tail), 12
    places = order.locate(np.arange(num_blocks * SLOTS * LANES))
    sources, first_block = sources_of(places), 0
    for number, (name, blocks) in enumerate(BLOCKS.items()):
        own = sources == number
        samples = list(zip(places.blocks[own] - first_block, places.samples[own], strict=True))
        everything = {(b, k) for b, size in enumerate(blocks) for k in range(size)}
        size = len(everything) if tail == "carry" else len(everything) // LANES * LANES
        whole_epochs, rest = divmod(int(own.sum()), size)
        assert whole_epochs >= 3
        for epoch in range(whole_epochs):
            seen = [s for s, e in zip(samples, places.epochs[own], strict=True) if e == epoch]
            assert len(seen) == len(set(seen)) == size
            assert set(seen) <= everything
        assert sum(places.epochs[own] == whole_epochs) == rest
        passes = order.epochs(len(sources))[name]
        assert abs(passes - own.sum() / size) < LANES / size
        first_block += len(blocks)


def test_ranks_keep_their_lanes_of_each_data_set() -> None:
    weights, blocks = {"a": 1.0, "b": 2.0}, {"a": [50] * 40, "b": [50] * 80}
    orders = {
        name: order_of(
            Numbers(blocks[name]),
            seed=1,
            batch_samples=8,
            window_mb=0.1,
            tail="drop",
            in_blend=True,
        )
        for name in weights
    }
    order = BlendOrder(orders, weights, {n: len(b) for n, b in blocks.items()}, seed=1)
    places = order.locate(np.arange(120 * 50 // (8 * SLOTS) * 8 * SLOTS))
    read = [set(places.blocks[rank::4].tolist()) for rank in range(4)]
    assert len(set.union(*read)) > 100
    assert sum(map(len, read)) <= 120 + 2 * (8 + 1)  # a lane begins and ends within blocks
    mixed = [set(places.blocks[rank::3].tolist()) for rank in range(3)]
    assert sum(map(len, mixed)) > 240  # three ranks do not divide eight lanes


def test_share_without_slots_is_refused() -> None:
    with pytest.raises(ValueError, match=r"corpus.sources.c.weight=.* -> a share of .* 0.02 ->"):
        make_order({"a": 5.0, "b": 3.0, "c": 0.1})
    make_order({"a": 5.0, "b": 3.0, "c": 0.17})
