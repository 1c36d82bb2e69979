"""Private memory of a loader process while it reads a million samples.

    python -m benchmarks.loader_memory [--samples 1000000]

For each kind of samples a process of its own reads an epoch, and tells its USS at ten points, less
the pages of shards that it has mapped: those belong to the page cache, which takes them back when
memory is short, though they count as private where no other process maps the file. The first two
points are warm-up; the last column is by how much the highest of the others is above the lowest.
"""

import argparse
import tempfile
from itertools import islice
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.million import BATCH, KINDS, in_new_process, open_loader, open_source, write_both

POINTS, WARM_UP = 10, 2


def private_bytes(process: psutil.Process) -> int:
    """USS without mapped shards."""
    mapped = sum(
        pages.private_clean + pages.private_dirty
        for pages in process.memory_maps()
        if pages.path.endswith(".tar")
    )
    return process.memory_full_info().uss - mapped


def read_epoch(folder: str) -> list[int]:
    """Read an epoch; private bytes at ten points of it."""
    process = psutil.Process()
    loader = open_loader(open_source(Path(folder)))
    batches, counts = iter(loader), []
    num_batches = len(loader) // 2
    for point in range(POINTS):
        share = num_batches * (point + 1) // POINTS - num_batches * point // POINTS
        assert sum(1 for _ in islice(batches, share)) == share
        counts.append(private_bytes(process))
    return counts


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=1_000_000)
    num_samples = parser.parse_args().samples
    table = Table("USS in MB at", *(f"{(p + 1) / POINTS:.0%}" for p in range(POINTS)), "spread")
    table.title = f"{num_samples:,} samples, batches of {BATCH}"
    with tempfile.TemporaryDirectory() as folder:
        write_both(Path(folder), num_samples)
        for kind in KINDS:
            found = in_new_process("benchmarks.loader_memory", read_epoch, str(Path(folder) / kind))
            spread = max(found[WARM_UP:]) / min(found[WARM_UP:]) - 1
            table.add_row(kind, *(f"{value / 1e6:.1f}" for value in found), f"{spread:.1%}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
