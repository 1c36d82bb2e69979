"""A data set of known tokens, and the ways in which its second shard goes bad.

A damage writes the data set into a folder and gives its index, the numbers of the bad samples, and
what the message of the first of them says.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from datamodules.index import Index
from tests.datamodules.by_hand import npy, stored_samples, write_index, write_tar

SCHEMA = {
    "tokens.npy": {"codec": "npy", "dtype": "uint16"},
    "ends.npy": {"codec": "npy", "dtype": "uint32"},
}
NUM_SHARDS, CHUNKS = 2, 4  # of a shard; blocks have two
LENGTH = 81  # five rows of 16, and no token left over that a phase could be drawn from
DOCUMENT = 27
SECOND = "train-000001.tar"  # whose chunks are 4 to 7

Damage = tuple[Index, tuple[set[int], str]]


def tokens_of(chunk: int) -> list[int]:
    return list(range(chunk * LENGTH, (chunk + 1) * LENGTH))


def members_of(chunk: int, tokens: list[int], dtype: str = "<u2") -> list[tuple[str, bytes]]:
    key = f"{chunk % CHUNKS:06d}"
    return [(f"{key}.ends.npy", npy([26, 53], "<u4")), (f"{key}.tokens.npy", npy(tokens, dtype))]


def write_dataset(
    path: Path,
    replaced: Mapping[int, int] | None = None,
    other_members: Mapping[int, list[tuple[str, bytes]]] | None = None,
) -> Index:
    """Write a data set, in which some chunks hold others' tokens, or have other members."""
    path.mkdir()
    every = range(NUM_SHARDS * CHUNKS)
    content = {n: members_of(n, tokens_of((replaced or {}).get(n, n))) for n in every}
    content |= other_members or {}
    for shard in range(NUM_SHARDS):
        members = [m for n in range(shard * CHUNKS, (shard + 1) * CHUNKS) for m in content[n]]
        write_tar(path / f"train-{shard:06d}.tar", members)
    return write_index(path, SCHEMA, [LENGTH] * CHUNKS, [DOCUMENT] * (CHUNKS * 3))


def edit(path: Path, change: Callable[[bytearray], Any]) -> None:
    content = bytearray(path.read_bytes())
    result = change(content)
    path.write_bytes(content if result is None else result)


def flip(path: Path, offset: int) -> None:
    def change(content: bytearray) -> None:
        content[offset] ^= 4

    edit(path, change)


def intact(path: Path) -> Damage:
    return write_dataset(path), (set(), "")


def flipped_payload(path: Path) -> Damage:
    index = write_dataset(path)
    offset, size = stored_samples(path / SECOND)[1].members["tokens.npy"]
    flip(path / SECOND, offset + size - 1)
    return index, ({5}, r"bytes? 2048 .*key 000001\)")


def flipped_name(path: Path) -> Damage:
    index = write_dataset(path)
    flip(path / SECOND, stored_samples(path / SECOND)[1].start + 3)
    return index, ({5}, r"no tar header at byte 2048 .*sample 1 of its block\)")


def flipped_size(path: Path) -> Damage:
    index = write_dataset(path)
    flip(path / SECOND, stored_samples(path / SECOND)[2].start + 130)
    return index, ({6, 7}, r"no tar header at byte 4096 .*sample 0 of its block\)")


def truncated_in_a_member(path: Path) -> Damage:
    index = write_dataset(path)
    offset, _ = stored_samples(path / SECOND)[1].members["tokens.npy"]
    edit(path / SECOND, lambda content: content[: offset + 150])
    return index, ({5, 6, 7}, r"byte 2048 lacks \['tokens.npy'\] .*key 000001\)")


def truncated_between_samples(path: Path) -> Damage:
    index = write_dataset(path)
    edit(path / SECOND, lambda content: content[: stored_samples(path / SECOND)[1].start])
    return index, ({5, 6, 7}, r"2 samples in the block at byte 0, the shard holds 1 .*sample 1")


def emptied(path: Path) -> Damage:
    index = write_dataset(path)
    (path / SECOND).write_bytes(b"")
    return index, ({4, 5, 6, 7}, r"cannot be mapped \(.*empty.*every key\)")


def vanished(path: Path) -> Damage:
    index = write_dataset(path)
    (path / SECOND).unlink()
    return index, ({4, 5, 6, 7}, r"cannot be mapped \(.*No such file.*every key\)")


def newer_of_equal_size(path: Path) -> Damage:
    index = write_dataset(path)
    members = [m for n in range(4, 8) for m in members_of(n, [t + 1 for t in tokens_of(n)])]
    size = (path / SECOND).stat().st_size
    write_tar(path / SECOND, members)
    assert (path / SECOND).stat().st_size == size
    return index, ({4, 5, 6, 7}, r"bytes? 0 .*key 000000\)")


def missing_member(path: Path) -> Damage:
    index = write_dataset(path, other_members={5: members_of(5, tokens_of(5))[1:]})
    return index, ({5}, r"byte 2048 lacks \['ends.npy'\] of the schema .*key 000001\)")


def repeated_member(path: Path) -> Damage:
    ends, tokens = members_of(5, tokens_of(5))
    index = write_dataset(path, other_members={5: [ends, tokens, tokens]})
    return index, ({5}, r"two members 000001.tokens.npy at byte 2048 .*key 000001\)")


def wrong_dtype(path: Path) -> Damage:
    index = write_dataset(path, other_members={5: members_of(5, tokens_of(5), "<u4")})
    return index, ({5}, r"uint32.*uint16.*key 000001\)")


def no_array(path: Path) -> Damage:
    ends, (name, _) = members_of(5, tokens_of(5))
    index = write_dataset(path, other_members={5: [ends, (name, b"of another kind" * 20)]})
    return index, ({5}, r"key 000001\)")


DAMAGES = [
    *(flipped_payload, flipped_name, flipped_size, truncated_in_a_member),
    *(truncated_between_samples, emptied, vanished, newer_of_equal_size),
    *(missing_member, repeated_member, wrong_dtype, no_array),
]
