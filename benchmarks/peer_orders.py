"""Orders in which litdata and mosaicml-streaming give samples, for `benchmarks.shuffle_quality`.

    peers/bin/python -m benchmarks.peer_orders LIBRARY SAMPLES CHUNK_SAMPLES BATCH FOLDER

Calls the libraries' own shuffles for one node and one worker and writes the numbers of the samples
to `FOLDER/<name>.npy`. A library that is missing writes none.
"""

# pyright: reportMissingImports=false
# The libraries are in the other environment.

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.peer_readers import stand_in_for_torchvision


def litdata_orders(bounds: np.ndarray, batch: int) -> dict[str, Any]:
    """Chunks permuted for the first epoch, and the items in each."""
    from litdata.streaming.shuffle import FullShuffle
    from litdata.utilities.env import _DistributedEnv

    pairs = zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
    intervals = [(start, start, stop, stop) for start, stop in pairs]
    cache: Any = SimpleNamespace(get_chunk_intervals=lambda: intervals, _reader=SimpleNamespace())
    shuffle = FullShuffle(cache, seed=42, drop_last=False)
    environment = _DistributedEnv(world_size=1, global_rank=0, num_nodes=1)
    (chunks,), (parts,) = shuffle.get_chunks_and_intervals_per_workers(environment, 1, 1, 1)
    order: list[int] = []
    for chunk, part in zip(chunks, parts, strict=True):
        order += shuffle(np.arange(part[1], part[2]), len(chunks), 1, int(chunk))
    return {"litdata": order}


def mosaic_orders(bounds: np.ndarray, batch: int) -> dict[str, Any]:
    """Shards permuted for the first epoch, and their samples spread by each algorithm."""
    stand_in_for_torchvision()
    from streaming.base.partition import get_partitions
    from streaming.base.shuffle import get_shuffle

    # As its data set chooses them for one node.
    nodes = {"py1e": 1, "py1s": 64}
    orders = {}
    for algorithm, num_nodes in nodes.items():
        block = max(4_000_000 // num_nodes, 1 << 18)
        parts = get_partitions("relaxed", int(bounds[-1]), num_nodes, 1, 1, 1, batch)
        spread = get_shuffle(algorithm, np.diff(bounds), num_nodes, 9176, 0, block)
        orders[f"mosaicml {algorithm}"] = spread[parts[parts >= 0]]
    return orders


LIBRARIES = {"litdata": litdata_orders, "mosaicml": mosaic_orders}


def main() -> None:
    """Compute and write."""
    library, num_samples, chunk_samples, batch, folder = sys.argv[1:]
    bounds = np.append(np.arange(0, int(num_samples), int(chunk_samples)), int(num_samples))
    try:
        orders = LIBRARIES[library](bounds, int(batch))
    except ImportError as err:
        print(f"no {library}: {err}")
        return
    for name, order in orders.items():
        np.save(Path(folder) / f"{name}.npy", np.array(order))


if __name__ == "__main__":
    main()
