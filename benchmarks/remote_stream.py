"""How long a training loop waits for shards in an object store that is slow and fails.

    python -m benchmarks.remote_stream [--latency-ms 50] [--fail-every 50] [--step-ms 100]

Starts an S3 server (moto's) in a process of its own on loopback, which answers each read late and
every so-many-th with 503, uploads a data set of made-up 50 KB samples in blocks of 1 MiB, and takes
one shuffled epoch of it through a cold cache, sleeping where a training step would compute. Counts
every sample, so that one that is lost or comes twice is found out. Needs the development
requirements.
"""

import argparse
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from datamodules import write
from datamodules.block_cache import BlockCache
from datamodules.index import ORIGIN_FILE, Index, read_index, write_index
from datamodules.loader import TrainLoader, order_of
from datamodules.remote import Fetcher
from datamodules.samples import StoredSamples
from datamodules.write import ShardWriter
from tests.datamodules.object_store import BUCKET, ObjectStore

SAMPLE_BYTES, SAMPLES_PER_SHARD, BLOCK_BYTES = 50_000, 400, 2**20
BATCH_SAMPLES, NUM_CONNECTIONS = 32, 8
CACHE_BYTES = 2**30


class SlowStore(ObjectStore):
    """Answers reads late, and some not at all."""

    def __init__(self, latency_s: float, fail_every: int) -> None:
        self._latency_s, self._fail_every, self._numbers = latency_s, fail_every, count(1)
        super().__init__()

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable:
        if environ["REQUEST_METHOD"] == "GET":
            time.sleep(self._latency_s)
            if next(self._numbers) % self._fail_every == 0:
                return self._unavailable(environ, start_response)
        return super()._answer(environ, start_response)


def serve(connection: Connection, folder: Path, latency_s: float, fail_every: int) -> None:
    """Serve the files of a folder until told to end."""
    store = SlowStore(latency_s, fail_every)
    for path in sorted(folder.glob("*.tar")):
        store.put(path.name, path.read_bytes())
    connection.send(store.options)
    connection.recv()
    store.close()


class RawNumbers:
    """Gives the number of each sample, after touching all its bytes."""

    def decode(self, members: Mapping[str, memoryview], key: np.uint64 | None) -> int:
        """Sum the bytes and read the number that they begin with."""
        content = np.frombuffer(members["bin"], np.uint8)
        content.sum()
        return int(content[:8].view(np.int64)[0])

    def collate(self, samples: Sequence[int]) -> list[int]:
        """Give the numbers."""
        return list(samples)

    def pad(self, batch: list[int], num_samples: int) -> None:
        """Mark what only fills up."""
        batch[num_samples:] = [-1] * (len(batch) - num_samples)


def write_data(folder: Path, num_samples: int) -> None:
    """Write numbered samples of incompressible bytes, and their index."""
    write.BLOCK_BYTES = BLOCK_BYTES
    rng, facts = np.random.default_rng(0), []
    for first in range(0, num_samples, SAMPLES_PER_SHARD):
        with ShardWriter(folder / f"train-{first:06d}.tar") as writer:
            for number in range(first, min(first + SAMPLES_PER_SHARD, num_samples)):
                content = np.int64(number).tobytes() + rng.bytes(SAMPLE_BYTES - 8)
                writer.write(len(content), {"bin": content})
            facts.append(writer.finish())
    write_index(folder, schema={"bin": {"codec": "bin"}}, tokenizer=None, shards=facts)


def take_epoch(
    index: Index, options: dict[str, Any], folder: Path, step_s: float, num_workers: int
) -> tuple[list[int], list[float], dict[str, int]]:
    """Take one epoch; gives the samples' numbers, seconds waited for each step, and counters."""
    cache = BlockCache(
        folder,
        max_bytes=CACHE_BYTES,
        num_readers=max(1, num_workers),
        num_connections=NUM_CONNECTIONS,
        fetcher=Fetcher(storage_options=options, max_attempts=8, timeout_s=60),
    )
    samples = StoredSamples(index, RawNumbers(), seed=0, cache=cache)
    order = order_of(samples, seed=0, batch_samples=BATCH_SAMPLES, window_mb=64, tail="pad_mask")
    loader = TrainLoader(
        samples,
        order,
        batch_samples=BATCH_SAMPLES,
        micro_batch=BATCH_SAMPLES,
        max_samples=order.samples_per_epoch,
        num_workers=num_workers,
        repeat_first_batch=False,
        rank=0,
        world_size=1,
    )
    seen: list[int] = []
    waits, before = [], 0.0
    for batch in loader:
        waits.append(loader.seconds_waited - before)
        before = loader.seconds_waited
        seen += [number for number in batch if number >= 0]
        time.sleep(step_s)
    return seen, waits, loader.counters()


def main() -> None:
    """Serve, read, count, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--latency-ms", type=float, default=50)
    parser.add_argument("--fail-every", type=int, default=50)
    parser.add_argument("--step-ms", type=float, default=100)
    parser.add_argument("--samples", type=int, default=12_800)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    given = parser.parse_args()
    results: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "data")
        folder.mkdir()
        write_data(folder, given.samples)
        ours, theirs = multiprocessing.Pipe()
        arguments = theirs, folder, given.latency_ms / 1e3, given.fail_every
        server = multiprocessing.get_context("spawn").Process(target=serve, args=arguments)
        server.start()
        options = ours.recv()
        (folder / ORIGIN_FILE).write_text(f"s3://{BUCKET}\n")
        index = read_index(folder)
        for num_workers in given.workers:
            cache = Path(name, f"cache-{num_workers}")
            begun = time.perf_counter()
            seen, waits, counts = take_epoch(
                index, options, cache, given.step_ms / 1e3, num_workers
            )
            seconds = time.perf_counter() - begun
            results[f"{num_workers} workers"] = {
                "steps": str(len(waits)),
                "each sample exactly once": str(sorted(seen) == list(range(given.samples))),
                "first batch, s": f"{waits[0]:.2f}",
                "waited, % of all time": f"{100 * sum(waits) / seconds:.1f}",
                "the same without the first": f"{100 * sum(waits[1:]) / (seconds - waits[0]):.1f}",
                "median wait, ms": f"{1e3 * statistics.median(waits):.2f}",
                "longest but the first, ms": f"{1e3 * max(waits[1:]):.0f}",
                "fetched, MiB": f"{counts['fetched_bytes'] / 2**20:.0f}",
                "requests repeated": str(counts["retries"]),
            }
            shutil.rmtree(cache)
        ours.send(None)
        server.join()
    table = Table("", *results)
    for measure in next(iter(results.values())):
        table.add_row(measure, *(result[measure] for result in results.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
