"""How well a sorted data set is mixed: the standard deviation of batch means, over that of i.i.d.

    python -m benchmarks.shuffle_quality [--peers peers/bin/python] [--batch 256]

Sample i of N has the value i / N, as images sorted by class have. Batch means of independent draws
have a standard deviation of sqrt(1 / 12 B); a batch whose samples come from few places of the data
set is off by more. The ratio is 1 where mixing is ideal, and may be below where batches are drawn
evenly. Only orders are computed, by each library's own code at its default settings, so that the
data set has a real size: that of ImageNet at 110 kB an image, of which our window and the buffers
hold a hundredth.

    ours                the order of `datamodules.order` over blocks of 8 MiB, `window_mb=1024`
    webdataset          its shard shuffle and a buffer, over shards of 1 GiB
    litdata             `FullShuffle` over chunks of 64 MB, whose items it shuffles in blocks of 256
    mosaicml            `py1e` and `py1s` over shards of 64 MiB, one node
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from webdataset.filters import shuffle

from benchmarks.peers import LIBRARIES, note_missing
from datamodules.order import EpochsOrder, GlobalOrder, count_lanes
from datamodules.write import BLOCK_BYTES

IMAGE_BYTES = 110_000
SHARD_BYTES, PEER_CHUNK_BYTES = 2**30, 2**26
BUFFERS = (1000, 5000)
WINDOWS_MB = (1024, 2048, 4096)


def ratio(order: NDArray[np.int64], batch: int) -> float:
    """Standard deviation of batch means over that of independent draws."""
    values = (order + 0.5) / len(order)
    means = values[: len(values) // batch * batch].reshape(-1, batch).mean(1)
    # About the known mean: an order that drifts through an epoch is worse, not better.
    return float(np.sqrt(((means - 0.5) ** 2).mean() / (1 / 12 / batch)))


def sizes(num_samples: int, num_bytes: int) -> NDArray[np.int64]:
    """Samples of shards or blocks of so many bytes; int64 [shards]."""
    own = num_bytes // IMAGE_BYTES
    return np.diff(np.append(np.arange(0, num_samples, own), num_samples))


def ours(num_samples: int, batch: int, window_mb: int) -> NDArray[np.int64]:
    """Numbers of the samples, in the order of the first epoch."""
    blocks, lanes = sizes(num_samples, BLOCK_BYTES), count_lanes(batch)
    window = window_mb * 2**20 // (lanes * IMAGE_BYTES)
    order = GlobalOrder(blocks, seed=0, num_lanes=lanes, window=window)
    places = EpochsOrder(order, tail="carry", step=batch).locate(np.arange(num_samples))
    return (np.cumsum(blocks) - blocks)[places.blocks] + places.samples


def stock(num_samples: int, buffer: int) -> NDArray[np.int64]:
    """The same by webdataset's filters, over numbers instead of the samples of tars."""
    counts = sizes(num_samples, SHARD_BYTES)
    firsts = np.cumsum(counts) - counts
    shards = shuffle(len(counts))(iter(range(len(counts))))
    numbers = (number for k in shards for number in range(firsts[k], firsts[k] + counts[k]))
    return np.array(list(shuffle(buffer)(numbers)))


def peer_orders(python: str, num_samples: int, batch: int) -> dict[str, NDArray[np.int64]]:
    """The same by the peers, in a process each of their environment; orders by name."""
    orders = {}
    with tempfile.TemporaryDirectory() as folder:
        for library in LIBRARIES:
            sizes = (num_samples, PEER_CHUNK_BYTES // IMAGE_BYTES, batch)
            arguments = [library, *map(str, sizes), folder]
            command = [python, "-m", "benchmarks.peer_orders", *arguments]
            subprocess.run(command, check=True, cwd=Path(__file__).parent.parent)
        for file in sorted(Path(folder).glob("*.npy")):
            orders[file.stem] = np.load(file)
    return orders


def main() -> None:
    """Compute and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=1_281_167)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--peers", metavar="PYTHON", help="of an environment with the peers")
    options = parser.parse_args()
    orders = {
        f"ours, window_mb={window_mb}": ours(options.samples, options.batch, window_mb)
        for window_mb in WINDOWS_MB
    }
    for buffer in BUFFERS:
        orders[f"webdataset, buffer of {buffer}"] = stock(options.samples, buffer)
    orders["independent draws"] = np.random.default_rng(0).permutation(options.samples)
    if options.peers is not None:
        orders |= peer_orders(options.peers, options.samples, options.batch)
    table = Table("order", "standard deviation of batch means, x i.i.d.", "samples")
    table.title = f"{options.samples:,} sorted samples, batches of {options.batch}"
    for name, order in orders.items():
        table.add_row(name, f"{ratio(order, options.batch):.2f}", f"{len(np.unique(order)):,}")
    Console(width=100).print(table)
    note_missing(options.peers)


if __name__ == "__main__":
    main()
