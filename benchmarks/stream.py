"""Tokens per second of the shard stream, beside a raw memory map and stock webdataset.

    python -m benchmarks.stream

Every reader makes int64 `inputs` and `targets` tensors [B, T] of the same made-up tokens, which lie
in the page cache, and every byte of them is summed. A round runs all readers in turn, so that they
share whatever else the machine does; the table has medians over the rounds. The count of tokens is
fixed, so a reader that drops some is found out.

Readers:
    memory map      one flat file of tokens, rows at random places, one vectorised copy per batch
    nanoGPT form    the same file, a row at a time: two slices, two conversions, two stacks
    stream          our loader in this process: shuffled, resumable, over shards
    stream, masks   the same with document numbers
    webdataset      the stock library on the same shards, rows cut from each chunk in sequence
    webdataset, shuffled    the same with its shard shuffle and a buffer of 1000 rows
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from webdataset.compat import WebDataset

from datamodules.index import Index, read_index, write_index
from datamodules.loader import TrainLoader, order_of
from datamodules.rows import TextRows
from datamodules.write import ShardWriter

NUM_SHARDS, CHUNKS_PER_SHARD, CHUNK_TOKENS = 8, 8, 2**19  # 64 MiB of uint16
DOCUMENT_TOKENS = 700
VOCAB_SIZE = 50_257
SHAPES = ((64, 12), (256, 8), (1024, 64))  # T, B: character level, quickstart, 124M

Pair = tuple[torch.Tensor, torch.Tensor]


def write_data(folder: Path) -> tuple[Index, Path]:
    """Write the same random tokens as shards and as one flat file."""
    rng = np.random.default_rng(0)
    facts = []
    (data := folder / "train").mkdir()
    with (flat := folder / "flat.u16").open("wb") as file:
        for shard in range(NUM_SHARDS):
            with ShardWriter(data / f"train-{shard:06d}.tar") as writer:
                for _ in range(CHUNKS_PER_SHARD):
                    tokens = rng.integers(0, VOCAB_SIZE, CHUNK_TOKENS).astype("<u2")
                    ends = np.arange(DOCUMENT_TOKENS, CHUNK_TOKENS, DOCUMENT_TOKENS, dtype="<u4")
                    writer.write(CHUNK_TOKENS, {"tokens.npy": tokens, "ends.npy": ends})
                    file.write(tokens.tobytes())
                facts.append(writer.finish())
    write_index(
        data,
        schema={
            "tokens.npy": {"codec": "npy", "dtype": "uint16"},
            "ends.npy": {"codec": "npy", "dtype": "uint32"},
        },
        tokenizer=None,
        shards=facts,
    )
    return read_index(data), flat


def memory_map(flat: Path, length: int, batch: int) -> Iterator[Pair]:
    """Draw rows at random and copy a batch of them in one call."""
    tokens, rng = np.memmap(flat, np.uint16, "r"), np.random.default_rng(0)
    rows = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)
    while True:
        found = rows[rng.integers(0, len(rows), batch)].astype(np.int64)
        yield torch.from_numpy(found[:, :-1]), torch.from_numpy(found[:, 1:])


def nanogpt_form(flat: Path, length: int, batch: int) -> Iterator[Pair]:
    """Draw rows at random and copy them one by one, inputs and targets apart."""
    tokens, rng = np.memmap(flat, np.uint16, "r"), np.random.default_rng(0)

    def rows(starts: list[int]) -> torch.Tensor:
        return torch.stack(
            [torch.from_numpy(tokens[start : start + length].astype(np.int64)) for start in starts]
        )

    while True:
        starts = rng.integers(0, len(tokens) - length - 1, batch).tolist()
        yield rows(starts), rows([start + 1 for start in starts])


def stream(index: Index, length: int, batch: int, *, document_mask: bool) -> Iterator[Pair]:
    """Take batches of our loader, without end."""
    rows = TextRows(index, sequence_length=length, document_mask=document_mask, seed=0)
    order = order_of(rows, seed=0, batch_samples=batch, window_mb=1024, tail="drop")
    loader = TrainLoader(
        rows,
        order,
        batch_samples=batch,
        micro_batch=batch,
        max_samples=10**9,
        num_workers=0,
        repeat_first_batch=False,
        rank=0,
        world_size=1,
    )
    for made in loader:
        if document_mask:
            made["documents"].sum()
        yield made["inputs"], made["targets"]


def stock(index: Index, length: int, batch: int, *, shuffled: bool) -> Iterator[Pair]:
    """Cut the chunks that webdataset yields into rows, again and again."""
    urls = [str(index.path / shard.url) for shard in index.shards]
    shards = WebDataset(urls, shardshuffle=NUM_SHARDS if shuffled else False, empty_check=False)

    def cut(samples: Iterator[dict]) -> Iterator[np.ndarray]:
        for sample in samples:
            tokens = sample["tokens.npy"]
            for start in range(0, len(tokens) - length, length):
                yield tokens[start : start + length + 1]

    rows = shards.decode().compose(cut)
    if shuffled:
        rows = rows.shuffle(1000)
    while True:
        source = iter(rows)
        while len(found := list(islice(source, batch))) == batch:
            made = np.stack(found).astype(np.int64)
            yield torch.from_numpy(made[:, :-1]), torch.from_numpy(made[:, 1:])


def measure(batches: Iterator[Pair], num_batches: int) -> float:
    """Time some batches, every byte of them touched; seconds."""
    begun = time.perf_counter()
    for inputs, targets in islice(batches, num_batches):
        inputs.sum()
        targets.sum()
    return time.perf_counter() - begun


def compare(index: Index, flat: Path, length: int, batch: int, rounds: int) -> Table:
    """Run all readers at one shape; a table of medians over the rounds."""
    readers: dict[str, Callable[[], Iterator[Pair]]] = {
        "memory map": lambda: memory_map(flat, length, batch),
        "nanoGPT form": lambda: nanogpt_form(flat, length, batch),
        "stream": lambda: stream(index, length, batch, document_mask=False),
        "stream, masks": lambda: stream(index, length, batch, document_mask=True),
        "webdataset": lambda: stock(index, length, batch, shuffled=False),
        "webdataset, shuffled": lambda: stock(index, length, batch, shuffled=True),
    }
    num_batches = max(100, 4_000_000 // (length * batch))
    running = {name: make() for name, make in readers.items()}
    for batches in running.values():
        measure(batches, num_batches)  # fill caches
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, batches in running.items():
            seconds[name].append(measure(batches, num_batches))
    table = Table("reader", "ms a batch", "Mtoken/s", "x memory map", "x nanoGPT form")
    table.title = f"T={length}, B={batch}, {num_batches} batches, {rounds} rounds"
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        table.add_row(
            name,
            f"{median / num_batches * 1e3:.3f}",
            f"{num_batches * length * batch / median / 1e6:.1f}",
            f"{medians['memory map'] / median:.2f}",
            f"{medians['nanoGPT form'] / median:.2f}",
        )
    return table


def main() -> None:
    """Write the data, compare the readers, print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        index, flat = write_data(Path(folder))
        for length, batch in SHAPES:
            Console().print(compare(index, flat, length, batch, rounds))


if __name__ == "__main__":
    main()
