"""Data sets of a million samples, and a process of its own for each measurement on them."""

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from webdataset.compat import WebDataset

from benchmarks.stream_images import RawBytes
from benchmarks.stream_tokens import CHUNK_TOKENS, SCHEMA
from datamodules.index import ShardFacts, read_index, write_index
from datamodules.loader import TrainLoader, order_of
from datamodules.rows import TextRows
from datamodules.samples import StoredSamples
from datamodules.workers import SampleSource
from datamodules.write import ShardWriter

NUM_SHARDS, SAMPLE_BYTES = 20, 100
ROW_TOKENS = 32
BATCH = 64
KINDS = ("stored samples", "text rows")


def write_samples(folder: Path, num_samples: int) -> None:
    """Write small samples, in two processes."""
    folder.mkdir()
    write = partial(_write_shard, folder, num_samples // NUM_SHARDS)
    with ProcessPoolExecutor(2) as pool:
        facts = list(pool.map(write, range(NUM_SHARDS)))
    write_index(folder, schema={"bin": {"codec": "raw"}}, tokenizer=None, shards=facts)


def _write_shard(folder: Path, num_samples: int, shard: int) -> ShardFacts:
    content = np.random.default_rng(shard).bytes(SAMPLE_BYTES)
    with ShardWriter(folder / f"train-{shard:06d}.tar") as writer:
        for number in range(num_samples):
            writer.write(SAMPLE_BYTES, {"bin": content}, key=f"{shard:03d}{number:06d}")
        return writer.finish()


def write_rows(folder: Path, num_rows: int) -> None:
    """Write chunks of tokens that make so many rows."""
    folder.mkdir()
    rng, facts = np.random.default_rng(0), []
    ends = np.arange(500, CHUNK_TOKENS, 500, dtype="<u4")
    chunks = range(-(-num_rows * ROW_TOKENS // CHUNK_TOKENS) + 1)
    for shard, own in enumerate(np.array_split(chunks, 4)):
        with ShardWriter(folder / f"train-{shard:06d}.tar") as writer:
            for _ in own:
                tokens = rng.integers(0, 50_000, CHUNK_TOKENS).astype("<u2")
                writer.write(CHUNK_TOKENS, {"tokens.npy": tokens, "ends.npy": ends})
            facts.append(writer.finish())
    write_index(folder, schema=SCHEMA, tokenizer=None, shards=facts)


def write_both(folder: Path, num_samples: int) -> None:
    """Write a data set of each of `KINDS`, in folders of these names."""
    write_samples(folder / KINDS[0], num_samples)
    write_rows(folder / KINDS[1], num_samples)


def open_source(folder: Path) -> SampleSource:
    """Read the index of one of them."""
    index = read_index(folder)
    if folder.name == KINDS[0]:
        return StoredSamples(index, RawBytes("bin", copies=True), seed=0)
    return TextRows(index, sequence_length=ROW_TOKENS, document_mask=False, seed=0)


def open_loader(source: SampleSource) -> TrainLoader:
    """Give the loader of a run over two epochs, as training with default settings has it."""
    order = order_of(source, seed=0, batch_samples=BATCH, window_mb=1024, tail="drop")
    return TrainLoader(
        source,
        order,
        batch_samples=BATCH,
        micro_batch=BATCH,
        max_samples=2 * order.samples_per_epoch,
        num_workers=0,
        repeat_first_batch=False,
        rank=0,
        world_size=1,
    )


def replay(folder: Path, num_samples: int) -> Any:
    """Give webdataset's batch behind so many samples, which it has to read to pass them."""
    urls = [str(url) for url in sorted(folder.glob("*.tar"))]
    shards = WebDataset(urls, shardshuffle=len(urls), empty_check=False)
    samples: Any = shards.shuffle(1000)
    return list(islice(samples, num_samples, num_samples + BATCH))


def in_new_process(module: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function of a module in a process that has done nothing else; what it returns.

    Arguments and result are JSON.
    """
    call = json.dumps([module, function.__name__, *arguments])
    command = [sys.executable, "-m", "benchmarks.million", call]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{call} -> {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Call a function and print what it returns."""
    module, function, *arguments = json.loads(sys.argv[1])
    __import__(module)
    print(json.dumps(getattr(sys.modules[module], function)(*arguments)))


if __name__ == "__main__":
    main()
