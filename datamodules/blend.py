"""Several data sets in one stream, by weight: an order over data sets laid behind each other.

Legend: L lanes, D data sets, w_d weight of data set d, W_d the sum of the weights up to d's.

Each lane of the run goes through slots, S = `SLOTS` to a block. In the first b blocks of a lane,
data set d has `floor(W_d * b * S) - floor(W_{d-1} * b * S)` slots: exact quotas, never off by more
than one. Which slots of a block they are is a hashed permutation, another for each lane. The i-th
slot that a lane gives to a data set takes index i of the same lane of that data set's own order, so
lanes stay lanes, every data set has epochs of its own, and nothing but the position is remembered.
"""

import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.corpora import Corpus
from datamodules.facts import FACTS_FILE, TOKENIZER_FILE, PreparedData
from datamodules.index import digest_bytes, write_atomically
from datamodules.order import EpochsOrder, Int64Array, Places, hash_key, permutation

SLOTS = 10_000
"""Slots of a block. A share below two slots could have a negative number of them."""

_SLOTS = 6  # purpose of the key, next to those of `datamodules.order`, `rows` and `samples`


class BlendOrder:
    """The order of a run over several data sets; a `datamodules.order.RunOrder`.

    Args:
        orders: name -> the order of a data set alone, all of the same lanes.
        weights: name -> share of the samples; scaled so that they sum to 1.
        blocks: name -> blocks of the data set; they are laid behind each other.
        seed: key of the permutations of slots.

    Raises:
        ValueError: a weight is below `2 / SLOTS` of all.
    """

    def __init__(
        self,
        orders: Mapping[str, EpochsOrder],
        weights: Mapping[str, float],
        blocks: Mapping[str, int],
        *,
        seed: int,
    ) -> None:
        total = sum(weights.values())
        shares = [weights[name] / total for name in orders]
        for name, share in zip(orders, shares, strict=True):
            if not share >= 2 / SLOTS:
                raise ValueError(
                    f"corpus.sources.{name}.weight={weights[name]} -> a share of {share:g} of all, "
                    f"and the least is {2 / SLOTS:g} -> raise it, or leave the source out"
                )
        self.num_lanes = next(iter(orders.values())).num_lanes
        self._orders, self._seed = dict(orders), seed
        self._shares = dict(zip(orders, shares, strict=True))
        self._bounds = np.cumsum(shares)
        self._bounds[-1] = 1.0
        sizes = [blocks[name] for name in orders]
        self._first_block = np.cumsum(sizes) - sizes
        self._slots: OrderedDict[tuple[int, int], tuple[Int64Array, Int64Array]] = OrderedDict()
        parts = {name: order.identity for name, order in orders.items()}
        self.identity: dict[str, Any] = {"seed": seed, "weights": self._shares, "blend": parts}

    def epochs(self, position: int) -> dict[str, float]:
        """Passes over each data set by name at a position, with fractions."""
        return {
            name: position * share / self._orders[name].samples_per_epoch
            for name, share in self._shares.items()
        }

    def locate(self, positions: Int64Array) -> Places:
        """Find the samples at some positions, int64 [n]."""
        sources, own = self._choose(positions)
        epochs, blocks, samples = (np.empty_like(positions) for _ in range(3))
        for number, order in enumerate(self._orders.values()):
            mine = sources == number
            if mine.any():
                found = order.locate(own[mine])
                epochs[mine], samples[mine] = found.epochs, found.samples
                blocks[mine] = found.blocks + self._first_block[number]
        return Places(epochs, blocks, samples)

    def _choose(self, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Data set of each position, and the position in that data set's own run."""
        lane, index = positions % self.num_lanes, positions // self.num_lanes
        block, slot = np.divmod(index, SLOTS)
        sources, own = np.empty_like(positions), np.empty_like(positions)
        group = block * self.num_lanes + lane
        by_group = np.argsort(group, kind="stable")
        starts = np.flatnonzero(np.diff(group[by_group], prepend=-1))
        for members in np.split(by_group, starts[1:]):
            chosen, index_in = self._block_of(int(lane[members[0]]), int(block[members[0]]))
            sources[members] = chosen[slot[members]]
            own[members] = index_in[slot[members]] * self.num_lanes + lane[members]
        return sources, own

    def _block_of(self, lane: int, block: int) -> tuple[Int64Array, Int64Array]:
        """Data set of each slot, and the index in its lane; int64 [SLOTS] each."""
        if (found := self._slots.get((lane, block))) is None:
            before, after = self._quotas(block), self._quotas(block + 1)
            chosen = np.repeat(np.arange(len(before)), after - before)
            key = hash_key(self._seed, _SLOTS, lane, block)
            chosen = chosen[permutation(SLOTS, key)]
            index = np.empty(SLOTS, np.int64)
            for number, first in enumerate(before.tolist()):
                mine = chosen == number
                index[mine] = first + np.arange(mine.sum())
            found = self._slots[lane, block] = chosen, index
            if len(self._slots) > 2 * self.num_lanes:
                self._slots.popitem(last=False)
        return found

    def _quotas(self, num_blocks: int) -> Int64Array:
        """Slots that each data set has in a lane's first blocks, int64 [D]."""
        ends = np.floor(self._bounds * (num_blocks * SLOTS)).astype(np.int64)
        return np.diff(ends, prepend=0)


class Blend:
    """Several corpora as one, in the places of a `datamodules.corpora.Corpus`.

    The vocabulary is that of the first source, and the end token if that lacks it; the others are
    encoded with it.

    Args:
        name: of the blend, the first part of the names of its folders.
        sources: name -> `weight`, and the settings of a corpus that are its own, such as `path`.
        settings: of all corpora.
    """

    def __init__(self, *, name: str, sources: Mapping[str, Mapping[str, Any]], **settings: Any):
        if not sources:
            raise ValueError(
                "corpus.sources={} -> a blend of nothing -> name sources, each with path and weight"
            )
        first = next(iter(sources))
        for source, own in sources.items():
            weight = own.get("weight")
            if not isinstance(weight, int | float) or not weight > 0:
                raise ValueError(
                    f"corpus.sources.{source}.weight={weight} -> no number above 0 -> give the "
                    "source's share of the samples, in any unit"
                )
            if source != first and "tokenizer" in own:
                raise ValueError(
                    f"corpus.sources.{source}.tokenizer={own['tokenizer']} -> the sources share "
                    f"the vocabulary of the first, {first} -> set corpus.tokenizer, or that of "
                    f"corpus.sources.{first}"
                )
        self._name, self._sources, self._settings = name, sources, settings

    def prepare(self, data_dir: str | Path) -> PreparedData:
        """Prepare every source below `data_dir`, or find it there; as `Corpus.prepare`."""
        prepared: dict[str, PreparedData] = {}
        settings = dict(self._settings)
        for source, own in self._sources.items():
            keys = settings | {key: value for key, value in own.items() if key != "weight"}
            prepared[source] = Corpus(name=f"{self._name}-{source}", **keys).prepare(data_dir)
            if len(prepared) == 1:
                settings |= {"tokenizer": str(prepared[source].path / TOKENIZER_FILE)}
        weights = {source: float(own["weight"]) for source, own in self._sources.items()}
        identity = [[weights[source], data.facts["digest"]] for source, data in prepared.items()]
        digest = digest_bytes(json.dumps(identity).encode())[:12]
        path = Path(data_dir, f"{self._name}-{digest}")
        path.mkdir(parents=True, exist_ok=True)
        vocabulary = _widest(prepared).path / TOKENIZER_FILE
        write_atomically(path / TOKENIZER_FILE, vocabulary.read_bytes())
        places = {
            source: {"path": str(data.path), "weight": weights[source]}
            for source, data in prepared.items()
        }
        facts = {"digest": digest, "sources": places, **_sum_facts(prepared)}
        write_atomically(path / FACTS_FILE, json.dumps(facts, indent=1).encode() + b"\n")
        return PreparedData(path, {"path": str(path), **facts})


def _widest(prepared: Mapping[str, PreparedData]) -> PreparedData:
    """Source of the largest vocabulary: a first one of one document alone has no end token."""
    return max(prepared.values(), key=lambda data: data.facts["vocab_size"])


def _sum_facts(prepared: Mapping[str, PreparedData]) -> dict[str, Any]:
    """Facts of a blend: sums over its sources, and the vocabulary they share."""
    every = [data.facts for data in prepared.values()]
    facts = {key: _widest(prepared).facts[key] for key in ("vocab_size", "end_token")}
    for key in ("documents", "tokens", "bytes"):
        facts[key] = {
            split: sum(f[key][split] or 0 for f in every) or None for split in every[0][key]
        }
    facts["bytes_per_token"] = {
        split: tokens and facts["bytes"][split] / tokens
        for split, tokens in facts["tokens"].items()
    }
    splits = [split for split, tokens in facts["tokens"].items() if tokens]
    facts["shards"] = {split: sum(f["shards"].get(split, 0) for f in every) for split in splits}
    return facts
