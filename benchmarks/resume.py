"""Seconds to the first batch after a resume, and what planning the order of 10^9 samples takes.

    python -m benchmarks.resume [--samples 1000000] [--rounds 5]

Two data sets of a million samples: tars of stored samples of 100 bytes, and rows of text cut from
chunks. Each measurement is a process of its own, begins when its imports are done and ends with the
first batch after 5%, 50% or 90% of the epoch: reading the index, planning the order, finding and
reading the samples. The page cache is warm; measurements take turns, and the table has medians.
webdataset has no state to resume from: it reads, again, all samples that it gave (once each, since
that takes as long as it does).

The index of 10^9 samples in 10^6 blocks is made up, with shards and tables of 4 GB that are holes
in their files. Memory is the growth of the process's USS, sampled every few milliseconds.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.million import (
    KINDS,
    NUM_SHARDS,
    SAMPLE_BYTES,
    in_new_process,
    open_loader,
    open_source,
    replay,
    write_both,
)
from datamodules.index import INDEX_FILE, INDEX_VERSION, digest_bytes

FRACTIONS = (0.05, 0.5, 0.9)
PLANNED_SAMPLES, PLANNED_BLOCKS, PLANNED_SHARDS = 10**9, 10**6, 1000
MODULE = "benchmarks.resume"


def resume_ours(folder: str, fraction: float) -> float:
    """Resume at a place of the epoch; seconds to the first batch.

    Of small samples in blocks of 8 MiB most of it is finding them in one block for each lane.
    """
    begun = time.perf_counter()
    loader = open_loader(open_source(Path(folder)))
    state = loader.stream_state()
    batches = len(loader) // 2  # of an epoch
    batch_samples = int(state["batch_samples"])
    loader.restore(state | {"position": int(batches * fraction) * batch_samples})
    next(iter(loader))
    return time.perf_counter() - begun


def resume_stock(folder: str, num_samples: int) -> float:
    """Pass over samples with webdataset; seconds to the batch behind them."""
    begun = time.perf_counter()
    replay(Path(folder), num_samples)
    return time.perf_counter() - begun


def compare_resumes(folder: Path, num_samples: int, rounds: int) -> Table:
    """Measure ours and webdataset at every place."""
    table = Table("seconds to the first batch", *(f"at {f:.0%}" for f in FRACTIONS), "90% / 5%")
    for kind in KINDS:
        data = str(folder / kind)
        in_new_process(MODULE, resume_ours, data, 0.5)  # fill the page cache
        found: dict[float, list[float]] = {fraction: [] for fraction in FRACTIONS}
        for _ in range(rounds):
            for fraction, seconds in found.items():
                seconds.append(in_new_process(MODULE, resume_ours, data, fraction))
        add_row(table, f"ours, {kind}", [statistics.median(found[f]) for f in FRACTIONS])
    data = str(folder / KINDS[0])
    passed = [in_new_process(MODULE, resume_stock, data, int(num_samples * f)) for f in FRACTIONS]
    add_row(table, f"webdataset, {KINDS[0]}", passed)
    table.title = (
        f"{num_samples:,} samples of {SAMPLE_BYTES} bytes in {NUM_SHARDS} shards, and rows"
    )
    return table


def add_row(table: Table, name: str, seconds: list[float]) -> None:
    """Add a reader."""
    ratio = seconds[-1] / seconds[0]
    table.add_row(name, *(f"{value:.3f}" for value in seconds), f"{ratio:.2f}")


def write_large_index(folder: Path, *, rows: bool) -> None:
    """Make an index up: of stored samples, or of chunks that give as many rows."""
    folder.mkdir()
    num_entries = PLANNED_BLOCKS if rows else PLANNED_SAMPLES
    per_block, shard_blocks = num_entries // PLANNED_BLOCKS, PLANNED_BLOCKS // PLANNED_SHARDS
    blocks = np.full((PLANNED_BLOCKS, 2), (per_block, 2**23), "<u4").tobytes()
    (folder / "blocks.u32").write_bytes(blocks)
    lengths = np.full(PLANNED_BLOCKS, PLANNED_SAMPLES // PLANNED_BLOCKS * 32 + 1, "<u4").tobytes()
    tables = {"blocks.u32": blocks, "lengths.u32": lengths, "checksums.u32": bytes(len(lengths))}
    for name in ("lengths.u32", "checksums.u32", "documents.u32"):
        with (folder / name).open("wb") as file:
            if rows:
                file.write(tables.get(name, b""))
            elif name != "documents.u32":
                file.truncate(4 * PLANNED_SAMPLES)
    shards = []
    for number in range(PLANNED_SHARDS):
        with (folder / f"train-{number:06d}.tar").open("wb") as file:
            file.truncate(shard_blocks * 2**23)
        counts = {"samples": shard_blocks * per_block, "blocks": shard_blocks, "documents": 0}
        shards.append({"url": file.name, "bytes": shard_blocks * 2**23, "digest": "", **counts})
    names = (*tables, "documents.u32")
    index = {
        "version": INDEX_VERSION,
        "schema": {"tokens.npy": {"codec": "npy", "dtype": "uint16"}},
        "tokenizer": None,
        "tables": {name: digest_bytes(tables.get(name, b"")) for name in names},
        "shards": shards,
    }
    (folder / INDEX_FILE).write_text(json.dumps(index))


def plan(folder: str) -> list[float]:
    """Load a large index and locate the first batches; seconds, and bytes at the peak."""
    process = psutil.Process()
    before, peak, done = process.memory_full_info().uss, 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.003):
            peak = max(peak, process.memory_full_info().uss)

    watching = threading.Thread(target=watch)
    watching.start()
    begun = time.perf_counter()
    source = open_source(Path(folder))
    loader = open_loader(source)
    places = loader._order.locate(np.arange(4096))
    seconds = time.perf_counter() - begun
    done.set()
    watching.join()
    assert len(places.blocks) == 4096
    after = process.memory_full_info().uss
    return [seconds, max(peak, after) - before, after - before]


def compare_plans(folder: Path, rounds: int) -> Table:
    """Measure both kinds of samples."""
    headings = ("seconds", "MB at the peak", "MB that stay")
    table = Table("index and order", *headings)
    table.title = f"{PLANNED_SAMPLES:.0e} samples in {PLANNED_BLOCKS:.0e} blocks"
    for kind in KINDS:
        write_large_index(data := folder / kind, rows=kind == KINDS[1])
        found = [in_new_process(MODULE, plan, str(data)) for _ in range(rounds)]
        seconds, peak, stay = (statistics.median(column) for column in zip(*found, strict=True))
        table.add_row(kind, f"{seconds:.2f}", f"{peak / 1e6:.0f}", f"{stay / 1e6:.0f}")
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Console(width=100).print(compare_plans(Path(folder), min(3, options.rounds)))
    with tempfile.TemporaryDirectory() as folder:
        write_both(Path(folder), options.samples)
        table = compare_resumes(Path(folder), options.samples, options.rounds)
        Console(width=100).print(table)


if __name__ == "__main__":
    main()
