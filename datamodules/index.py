"""The index of a data set: what its shards hold, without opening them.

A data set is a folder of plain tar shards with `index.json` (schema, tokenizer, and per shard its
url, bytes, samples, blocks and digest), `blocks.u32` (samples and bytes of every block: a run of
whole samples that is read together), and `lengths.u32` (tokens of every sample).
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

INDEX_VERSION = 1
INDEX_FILE, BLOCKS_FILE, LENGTHS_FILE = "index.json", "blocks.u32", "lengths.u32"
_UINT32 = np.dtype("<u4")


@dataclass(frozen=True)
class Shard:
    """One tar of a data set.

    Attributes:
        url: name of the file, relative to the index.
        num_bytes: size of the file.
        num_samples: samples in it.
        num_blocks: rows of the block table that describe it.
        digest: BLAKE2b of its bytes, as `digest_file` gives it.
    """

    url: str
    num_bytes: int
    num_samples: int
    num_blocks: int
    digest: str


@dataclass(frozen=True)
class Index:
    """A data set as its index tells it.

    Attributes:
        path: folder of the data set.
        digest: of the index, and through it of every shard and table.
        schema: member extension -> `{"codec": ..., "dtype": ...}`.
        tokenizer: path of the tokenizer, relative to `path`.
        shards: in order.
        blocks: uint32 [blocks, 2], samples and bytes of each block; blocks do not span shards.
        lengths: uint32 [samples], tokens of each sample.
    """

    path: Path
    digest: str
    schema: dict[str, dict[str, str]]
    tokenizer: str
    shards: tuple[Shard, ...]
    blocks: NDArray[np.uint32]
    lengths: NDArray[np.uint32]


def digest_bytes(content: bytes) -> str:
    """Hash bytes: BLAKE2b of 16 bytes, in hexadecimal."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def digest_file(path: Path) -> str:
    """Hash a file's bytes, as `digest_bytes` does."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file beside its place and rename it, so that a reader sees all of it or none."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def write_index(
    path: Path,
    *,
    schema: dict[str, dict[str, str]],
    tokenizer: str,
    shards: list[Shard],
    blocks: NDArray[np.uint32],
    lengths: NDArray[np.uint32],
) -> None:
    """Write the tables and then the index of the shards in `path`; arguments as in `Index`."""
    tables = {
        BLOCKS_FILE: blocks.astype(_UINT32).tobytes(),
        LENGTHS_FILE: lengths.astype(_UINT32).tobytes(),
    }
    for name, content in tables.items():
        write_atomically(path / name, content)
    content = {
        "version": INDEX_VERSION,
        "schema": schema,
        "tokenizer": tokenizer,
        "tables": {name: digest_bytes(content) for name, content in tables.items()},
        "shards": [
            {
                "url": shard.url,
                "bytes": shard.num_bytes,
                "samples": shard.num_samples,
                "blocks": shard.num_blocks,
                "digest": shard.digest,
            }
            for shard in shards
        ],
    }
    write_atomically(path / INDEX_FILE, json.dumps(content, indent=1).encode() + b"\n")


def read_index(path: Path) -> Index:
    """Read a data set's index and check it against its tables and the sizes of its shards.

    Raises:
        ValueError: the index is missing, of another version, or does not match a table or shard;
            the message names the file and both values.
    """
    try:
        content = (path / INDEX_FILE).read_bytes()
    except FileNotFoundError as err:
        raise ValueError(
            f"data set {path}: there is no {INDEX_FILE} -> its samples cannot be found -> "
            "prepare the corpus again (python -m launch.prepare)"
        ) from err
    facts = json.loads(content)
    if facts["version"] != INDEX_VERSION:
        raise ValueError(
            f"{path / INDEX_FILE}: version={facts['version']} -> this code reads version "
            f"{INDEX_VERSION} -> delete {path.parent} and prepare the corpus again"
        )
    shards = tuple(
        Shard(entry["url"], entry["bytes"], entry["samples"], entry["blocks"], entry["digest"])
        for entry in facts["shards"]
    )
    index = Index(
        path=path,
        digest=digest_bytes(content),
        schema=facts["schema"],
        tokenizer=facts["tokenizer"],
        shards=shards,
        blocks=_read_table(path, BLOCKS_FILE, facts).reshape(-1, 2),
        lengths=_read_table(path, LENGTHS_FILE, facts),
    )
    for shard in shards:
        _check_size(index, shard)
    return index


def _read_table(path: Path, name: str, facts: dict[str, Any]) -> NDArray[np.uint32]:
    try:
        content = (path / name).read_bytes()
    except FileNotFoundError as err:
        raise _table_error(path, name, "is missing") from err
    if digest_bytes(content) != facts["tables"][name]:
        raise _table_error(path, name, "is not the table that the index was written with")
    return np.frombuffer(content, _UINT32)


def _table_error(path: Path, name: str, problem: str) -> ValueError:
    return ValueError(
        f"data set {path}: {name} {problem} -> samples would be looked for in wrong places -> "
        f"delete {path.parent} and prepare the corpus again"
    )


def _check_size(index: Index, shard: Shard) -> None:
    try:
        found = (index.path / shard.url).stat().st_size
    except FileNotFoundError as err:
        raise _mismatch(index.path, shard, "bytes", shard.num_bytes, "no such file") from err
    if found != shard.num_bytes:
        raise _mismatch(index.path, shard, "bytes", shard.num_bytes, found)


def _mismatch(path: Path, shard: Shard, what: str, expected: object, found: object) -> ValueError:
    return ValueError(
        f"data set {path}: the index and a shard disagree, {what} in the index {expected}, found "
        f"{found} -> its samples cannot be trusted -> restore the shard, or delete {path.parent} "
        f"and prepare the corpus again (shard {shard.url})"
    )
