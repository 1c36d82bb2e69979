"""Readers of rows of tokens: int64 `inputs` and `targets` [B, T].

memory map      one flat file of tokens, rows at random places, one vectorised copy per batch, of
                which inputs and targets are views
nanoGPT form    the same file, a row at a time: two slices, two conversions, two stacks
ours            our loader in this process: shuffled, resumable, over shards; views of a copy too
ours, masks     the same with document numbers
ours, packed    whole documents, best-fit in rows, with document numbers
webdataset      the stock library on the same shards, rows cut from each chunk in sequence
webdataset, shuffled    the same with its shard shuffle and a buffer of 1000 rows
webdataset, a row a sample    likewise, from shards in the library's usual form

Packed rows are counted whole, with the few places that no document fills.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from webdataset.compat import WebDataset
from webdataset.writer import ShardWriter

from benchmarks.turns import Reader, Side, Tokens, touch_tokens
from datamodules.index import Index, read_index, write_index
from datamodules.loader import TrainLoader, order_of
from datamodules.pack import PackedRows
from datamodules.rows import TextRows
from datamodules.workers import SampleSource
from datamodules.write import ShardWriter as ChunkWriter

NUM_SHARDS, CHUNKS_PER_SHARD, CHUNK_TOKENS = 8, 8, 2**19  # 64 MiB of uint16
DOCUMENT_TOKENS = 700  # on average
VOCAB_SIZE = 50_257
SCHEMA = {
    "tokens.npy": {"codec": "npy", "dtype": "uint16"},
    "ends.npy": {"codec": "npy", "dtype": "uint32"},
}
ROW_SAMPLES = 2**14  # in shards of a row a sample, which take far more disk than tokens
ENDLESS = 10**12
"""Samples of a run that is not to end."""


def write_tokens(folder: Path, num_shards: int = NUM_SHARDS) -> Index:
    """Write the same random tokens as shards and as one flat file, `tokens.u16`."""
    rng = np.random.default_rng(0)
    facts = []
    (data := folder / "train").mkdir()
    with (folder / "tokens.u16").open("wb") as file:
        for shard in range(num_shards):
            documents: list[int] = []
            with ChunkWriter(data / f"train-{shard:06d}.tar") as writer:
                for _ in range(CHUNKS_PER_SHARD):
                    tokens = rng.integers(0, VOCAB_SIZE, CHUNK_TOKENS).astype("<u2")
                    lengths = draw_lengths(rng)
                    ends = (np.cumsum(lengths) - 1).astype("<u4")
                    writer.write(CHUNK_TOKENS, {"tokens.npy": tokens, "ends.npy": ends})
                    file.write(tokens.tobytes())
                    documents += lengths
                facts.append(writer.finish(documents))
    write_index(data, schema=SCHEMA, tokenizer=None, shards=facts)
    return read_index(data)


def draw_lengths(rng: np.random.Generator) -> list[int]:
    """Cut a chunk into documents of log-normal lengths."""
    drawn = rng.lognormal(np.log(DOCUMENT_TOKENS) - 0.5, 1.0, 2 * CHUNK_TOKENS // DOCUMENT_TOKENS)
    ends = np.cumsum(np.maximum(2, drawn).astype(np.int64))
    ends = np.append(ends[ends < CHUNK_TOKENS], CHUNK_TOKENS)
    return np.diff(ends, prepend=0).tolist()


def endless(source: SampleSource, batch: int, window_mb: float = 1024) -> Callable[[], Any]:
    """Give our loader's batches, an epoch at each call."""
    order = order_of(source, seed=0, batch_samples=batch, window_mb=window_mb, tail="drop")
    loader = TrainLoader(
        source,
        order,
        batch_samples=batch,
        micro_batch=batch,
        max_samples=ENDLESS // batch * batch,
        num_workers=0,
        repeat_first_batch=False,
        rank=0,
        world_size=1,
    )
    batches = iter(loader)
    return lambda: islice(batches, order.samples_per_epoch // batch)


def memory_map(flat: Path, length: int, batch: int) -> Iterator[Tokens]:
    """Draw rows at random and copy a batch of them in one call."""
    tokens, rng = np.memmap(flat, np.uint16, "r"), np.random.default_rng(0)
    rows = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)
    while True:
        found = rows[rng.integers(0, len(rows), batch)].astype(np.int64)
        yield torch.from_numpy(found[:, :-1]), torch.from_numpy(found[:, 1:])


def nanogpt_form(flat: Path, length: int, batch: int) -> Iterator[Tokens]:
    """Draw rows at random and copy them one by one, inputs and targets apart."""
    tokens, rng = np.memmap(flat, np.uint16, "r"), np.random.default_rng(0)

    def rows(starts: list[int]) -> torch.Tensor:
        return torch.stack(
            [torch.from_numpy(tokens[start : start + length].astype(np.int64)) for start in starts]
        )

    while True:
        starts = rng.integers(0, len(tokens) - length - 1, batch).tolist()
        yield rows(starts), rows([start + 1 for start in starts])


def write_rows(folder: Path, flat: Path, length: int) -> list[str]:
    """Write the first rows of the flat file as stock webdataset would, a sample each."""
    tokens = np.memmap(flat, np.uint16, "r")
    (folder := folder / f"rows-{length}").mkdir(exist_ok=True)
    num_rows = min(ROW_SAMPLES, (len(tokens) - 1) // length)
    pattern, in_shard = str(folder / "rows-%06d.tar"), -(-num_rows // 8)
    with ShardWriter(pattern, maxcount=in_shard, verbose=0) as writer:
        for row in range(num_rows):
            cut = tokens[row * length : row * length + length + 1]
            writer.write({"__key__": f"{row:08d}", "tokens.npy": np.array(cut)})
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def stock_rows(urls: list[str], batch: int) -> Callable[[], Any]:
    """Take the rows that webdataset yields, shuffled, an epoch at each call."""
    shards: Any = WebDataset(urls, shardshuffle=len(urls), empty_check=False)
    rows = shards.shuffle(1000).decode().to_tuple("tokens.npy")

    def epoch() -> Iterator[Tokens]:
        source: Iterator[Any] = iter(rows)
        while found := [row for (row,) in islice(source, batch)]:
            made = torch.from_numpy(np.stack(found).astype(np.int64))
            yield made[:, :-1], made[:, 1:]

    return epoch


def stock(index: Index, length: int, batch: int, *, shuffled: bool) -> Callable[[], Any]:
    """Cut the chunks that webdataset yields into rows, an epoch at each call."""
    urls = [shard.url for shard in index.shards]
    shards = WebDataset(urls, shardshuffle=len(urls) if shuffled else False, empty_check=False)

    def cut(samples: Iterator[dict]) -> Iterator[np.ndarray]:
        for sample in samples:
            tokens = sample["tokens.npy"]
            for start in range(0, len(tokens) - length, length):
                yield tokens[start : start + length + 1]

    rows: Any = shards.decode().compose(cut)
    if shuffled:
        rows = rows.shuffle(1000)

    def epoch() -> Iterator[Tokens]:
        source: Iterator[Any] = iter(rows)
        while found := list(islice(source, batch)):
            made = torch.from_numpy(np.stack(found).astype(np.int64))
            yield made[:, :-1], made[:, 1:]

    return epoch


def token_sides(index: Index, flat: Path, length: int, batch: int) -> dict[str, Side]:
    """Give the readers at one shape."""

    def masked(batches: Callable[[], Any]) -> Callable[[], Iterator[Tokens]]:
        def epoch() -> Iterator[Tokens]:
            for made in batches():
                if "documents" in made:
                    made["documents"].sum()
                yield made["inputs"], made["targets"]

        return epoch

    def rows(document_mask: bool) -> Callable[[], Any]:
        source = TextRows(index, sequence_length=length, document_mask=document_mask, seed=0)
        return masked(endless(source, batch))

    packed = PackedRows(index, sequence_length=length, end_token=VOCAB_SIZE - 1)
    epochs: dict[str, Callable[[], Any]] = {
        "memory map": lambda: memory_map(flat, length, batch),
        "nanoGPT form": lambda: nanogpt_form(flat, length, batch),
        "ours": rows(False),
        "ours, masks": rows(True),
        "ours, packed": masked(endless(packed, batch)),
        "webdataset": stock(index, length, batch, shuffled=False),
        "webdataset, shuffled": stock(index, length, batch, shuffled=True),
        "webdataset, a row a sample": stock_rows(write_rows(flat.parent, flat, length), batch),
    }
    return {name: Reader(epoch, touch_tokens) for name, epoch in epochs.items()}
