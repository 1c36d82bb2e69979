"""Samples per second of the shard stream, beside memory maps, webdataset, litdata and mosaicml.

    python -m benchmarks.stream [--only tokens] [--peers peers/bin/python] [--rounds 5]

Two kinds of data: rows of tokens, cut from shards of token chunks, at three shapes
(`benchmarks.stream_tokens`), and images of 50 kB (`benchmarks.stream_images`). All readers work in
one process and thread, on the same made-up payload, which lies in the page cache (it has just been
written, and each reader has a turn before those that count). A round runs all readers in turn, so
that they share whatever else the machine does; each turn is a fixed number of batches, or what is
read in a second, and every byte is read. Tables have medians over the rounds.

Samples are counted: the last column has those of a reader's last whole epoch, if any, of those
that there are, and for images whether their digests add up to those that were written. Ours drops
the samples behind the last whole batch of an epoch, other ones in each.

litdata and mosaicml-streaming take part where `--peers` names the Python of an environment that has
them; `benchmarks/peers.py` tells how to make it.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.peers import Peers, note_missing
from benchmarks.stream_images import image_sides, write_images
from benchmarks.stream_tokens import token_sides, write_tokens
from benchmarks.turns import Turn, take_turns

SHAPES = ((64, 12), (256, 8), (1024, 64))  # T, B: character level, quickstart, 124M
TURN_TOKENS, TURN_BATCHES = 2_000_000, 100  # the larger of both
IMAGE_BYTES, IMAGE_BATCH = 50_000, 64
BASES = ("memory map", "webdataset, shuffled")


def tabulate(title: str, turns: dict[str, list[Turn]], num_samples: int, scale: float) -> Table:
    """Make a table of medians.

    Args:
        title: of it.
        turns: by reader.
        num_samples: that there are in an epoch.
        scale: what a sample counts for in the rate.
    """
    table = Table("reader", "rate", *(f"x {base}" for base in BASES), f"of {num_samples:,}")
    table.title = title
    rates = {
        name: statistics.median(turn.samples * scale / turn.seconds for turn in own)
        for name, own in turns.items()
    }
    for name, rate in rates.items():
        counted = turns[name][-1].epoch_samples
        table.add_row(
            name,
            f"{rate:,.1f}",
            *(f"{rate / rates[base]:.2f}" for base in BASES),
            "" if counted is None else f"{counted:,}",
        )
    return table


def compare_tokens(folder: Path, num_shards: int, rounds: int, python: str | None) -> list[Table]:
    """Run the readers of tokens at every shape."""
    index, tables = write_tokens(folder, num_shards), []
    flat = folder / "tokens.u16"
    num_tokens = flat.stat().st_size // 2
    for length, batch in SHAPES:
        with Peers(python, ["tokens", str(length), str(batch), str(folder)]) as peers:
            sides = token_sides(index, flat, length, batch) | peers.sides
            num_batches = max(TURN_BATCHES, TURN_TOKENS // (length * batch))
            turns = take_turns(sides, num_batches, rounds)
        title = f"tokens, million/s: T={length}, B={batch}, {num_batches} batches a turn, warm"
        tables.append(tabulate(title, turns, num_tokens // length, length / 1e6))
    return tables


def compare_images(folder: Path, num_images: int, rounds: int, python: str | None) -> Table:
    """Run the readers of images; a turn is an epoch.

    Raises:
        RuntimeError: a reader gave others than were written.
    """
    index, digest = write_images(folder, num_images, IMAGE_BYTES)
    num_batches = -(-num_images // IMAGE_BATCH)
    with Peers(python, ["images", str(IMAGE_BYTES), str(IMAGE_BATCH), str(folder)]) as peers:
        flat = folder / "images.bin"
        sides = image_sides(index, flat, IMAGE_BYTES, IMAGE_BATCH) | peers.sides
        turns = take_turns(sides, num_batches, rounds)
    for name, own in turns.items():
        if own[-1].epoch_samples == num_images and own[-1].epoch_digest != digest:
            raise RuntimeError(f"{name} -> other images than were written")
    title = f"images of {IMAGE_BYTES:,} bytes, a second: B={IMAGE_BATCH}, an epoch a turn, warm"
    return tabulate(title, turns, num_images, 1)


def main() -> None:
    """Write the data, compare the readers, print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("tokens", "images"))
    parser.add_argument("--peers", metavar="PYTHON", help="of an environment with the peers")
    parser.add_argument("--images", type=int, default=12_800, help="how many, of 50 kB each")
    parser.add_argument("--shards", type=int, default=8, help="of tokens, of 8 MiB each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only != "images":
        with tempfile.TemporaryDirectory() as folder:
            found = compare_tokens(Path(folder), options.shards, options.rounds, options.peers)
            Console(width=110).print(*found)
    if options.only != "tokens":
        with tempfile.TemporaryDirectory() as folder:
            table = compare_images(Path(folder), options.images, options.rounds, options.peers)
            Console(width=110).print(table)
    note_missing(options.peers)


if __name__ == "__main__":
    main()
