"""The index of a data set: what its shards hold, without opening them.

A data set is a folder of plain tar shards with `index.json` (schema, tokenizer, and per shard its
url, bytes, samples, blocks, documents and digest) and tables of uint32 beside it:

    blocks.u32      samples and bytes of every block: a run of whole samples that is read together
    lengths.u32     tokens of every sample, or its bytes where it has no tokens
    checksums.u32   of every sample's bytes in its shard, header and padding among them
    documents.u32   tokens of every document of a text, its end token among them

Tables of samples and documents are mapped, not read, so that 10^9 samples cost no memory.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from datamodules.remote import is_remote

INDEX_VERSION = 2
INDEX_FILE, ORIGIN_FILE = "index.json", "origin"
BLOCKS, LENGTHS, CHECKSUMS, DOCUMENTS = (
    f"{name}.u32" for name in ("blocks", "lengths", "checksums", "documents")
)
_UINT32 = np.dtype("<u4")

CHECKED_BYTES = 64 * 2**20
"""Tables up to this size are hashed when an index is read; `launch.prepare inspect=` hashes all."""


@dataclass(frozen=True)
class Shard:
    """One tar of a data set.

    Attributes:
        url: name of the file, relative to the index, or a whole url.
        num_bytes: size of the file; 0 where it is not known (`pipe:`).
        num_samples: samples in it.
        num_blocks: rows of the block table that describe it.
        num_documents: rows of the document table that describe it; 0 where it holds no text.
        digest: BLAKE2b of its bytes, as `digest_file` gives it.
    """

    url: str
    num_bytes: int
    num_samples: int
    num_blocks: int
    num_documents: int
    digest: str


@dataclass(frozen=True)
class ShardFacts:
    """What an index takes over about one shard.

    Attributes:
        shard: its entry.
        blocks: samples and bytes of each block.
        lengths: tokens of each sample.
        checksums: of each sample.
        documents: tokens of each document.
    """

    shard: Shard
    blocks: Sequence[tuple[int, int]]
    lengths: Sequence[int]
    checksums: Sequence[int]
    documents: Sequence[int]


@dataclass(frozen=True)
class Index:
    """A data set as its index tells it.

    Attributes:
        path: folder of the index.
        digest: of the index, and through it of every shard and table.
        schema: member extension -> `{"codec": ..., "dtype": ...}`; `"optional": "true"` where
            samples may lack it.
        tokenizer: path of the tokenizer, relative to `path`; None where there is none.
        shards: in order; their urls are whole ones, or paths.
        blocks: uint32 [blocks, 2], samples and bytes of each block; blocks do not span shards.
        lengths: uint32 [samples], tokens of each sample.
        checksums: uint32 [samples], `checksum` of each sample.
        documents: uint32 [documents], tokens of each document; documents do not span shards.
    """

    path: Path
    digest: str
    schema: dict[str, dict[str, str]]
    tokenizer: str | None
    shards: tuple[Shard, ...]
    blocks: NDArray[np.uint32]
    lengths: NDArray[np.uint32]
    checksums: NDArray[np.uint32]
    documents: NDArray[np.uint32]


def checksum(content: Any) -> int:
    """Hash a sample's bytes: the low 32 bits of XXH3 (64 bits, seed 0), at memory speed."""
    return xxhash.xxh3_64_intdigest(content) & 0xFFFFFFFF


def digest_bytes(content: Any) -> str:
    """Hash bytes: BLAKE2b of 16 bytes, in hexadecimal."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def digest_file(path: Path) -> str:
    """Hash a file's bytes, as `digest_bytes` does."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file beside its place and rename it, so that a reader sees all of it or none."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")  # pids meet across nodes
    temporary.write_bytes(content)
    temporary.replace(path)


def write_index(
    path: Path,
    *,
    schema: dict[str, dict[str, str]],
    tokenizer: str | None,
    shards: Sequence[ShardFacts],
) -> None:
    """Write the tables and then the index of the shards in `path`; arguments as in `Index`."""
    tables = {
        BLOCKS: [row for facts in shards for row in facts.blocks],
        LENGTHS: [n for facts in shards for n in facts.lengths],
        CHECKSUMS: [n for facts in shards for n in facts.checksums],
        DOCUMENTS: [n for facts in shards for n in facts.documents],
    }
    content = {name: np.array(rows, _UINT32).tobytes() for name, rows in tables.items()}
    for name, table in content.items():
        write_atomically(path / name, table)
    index = {
        "version": INDEX_VERSION,
        "schema": schema,
        "tokenizer": tokenizer,
        "tables": {name: digest_bytes(table) for name, table in content.items()},
        "shards": [
            {key.removeprefix("num_"): value for key, value in asdict(facts.shard).items()}
            for facts in shards
        ],
    }
    write_atomically(path / INDEX_FILE, json.dumps(index, indent=1).encode() + b"\n")


def read_index(path: Path, *, allow_short: bool = False) -> Index:
    """Read a data set's index and check it against its tables and the sizes of its shards.

    Shards lie beside the index, or where the file `origin` in its folder says.

    Args:
        path: folder of the index.
        allow_short: let shards be cut short, whose missing samples are then found by reading.

    Raises:
        ValueError: the index is missing, of another version, or does not match a table or shard;
            the message names the file and both values.
    """
    facts, digest = read_facts(path)
    _check_version(path, facts)
    origin = path / ORIGIN_FILE
    base = origin.read_text().strip() if origin.exists() else str(path)
    shards = tuple(
        Shard(
            _locate(base, entry["url"]),
            *(entry[key] for key in ("bytes", "samples", "blocks", "documents", "digest")),
        )
        for entry in facts["shards"]
    )
    num_samples = sum(shard.num_samples for shard in shards)
    rows = {
        BLOCKS: 2 * sum(shard.num_blocks for shard in shards),
        LENGTHS: num_samples,
        CHECKSUMS: num_samples,
        DOCUMENTS: sum(shard.num_documents for shard in shards),
    }
    tables = {name: _map_table(path, name, count, facts) for name, count in rows.items()}
    for shard in shards:
        if not is_remote(shard.url):
            _check_size(path, shard, allow_short)
    return Index(
        path=path,
        digest=digest,
        schema=facts["schema"],
        tokenizer=facts["tokenizer"],
        shards=shards,
        blocks=tables[BLOCKS].reshape(-1, 2),
        lengths=tables[LENGTHS],
        checksums=tables[CHECKSUMS],
        documents=tables[DOCUMENTS],
    )


def join_indexes(indexes: Sequence[Index]) -> Index:
    """Lay data sets of one schema behind each other, as if they were one."""
    first = indexes[0]
    return Index(
        path=first.path,
        digest=digest_bytes(" ".join(index.digest for index in indexes).encode()),
        schema=first.schema,
        tokenizer=first.tokenizer,
        shards=tuple(shard for index in indexes for shard in index.shards),
        blocks=np.concatenate([index.blocks for index in indexes]),
        lengths=np.concatenate([index.lengths for index in indexes]),
        checksums=np.concatenate([index.checksums for index in indexes]),
        documents=np.concatenate([index.documents for index in indexes]),
    )


def _locate(base: str, url: str) -> str:
    if is_remote(url) or url.startswith("/"):
        return url
    return f"{base.rstrip('/')}/{url}"


def read_facts(path: Path) -> tuple[dict[str, Any], str]:
    """Read `index.json` as it is written, of any version, and its digest.

    Raises:
        ValueError: there is none, or it was written by something else.
    """
    try:
        content = (path / INDEX_FILE).read_bytes()
    except FileNotFoundError as err:
        raise ValueError(
            f"data set {path}: there is no {INDEX_FILE} -> its samples cannot be found -> prepare "
            "the corpus again, or write it for shards that are there (launch.prepare index=)"
        ) from err
    try:
        facts = json.loads(content)
    except ValueError:
        facts = None
    if not isinstance(facts, dict) or not {"version", "schema", "shards"} <= facts.keys():
        raise ValueError(
            f"{path / INDEX_FILE}: it is damaged or of another library -> samples cannot be found "
            "by it -> restore it, or write one of tar shards elsewhere (launch.prepare index= out=)"
        )
    return facts, digest_bytes(content)


def _check_version(path: Path, facts: dict[str, Any]) -> None:
    if facts["version"] != INDEX_VERSION:
        raise ValueError(
            f"{path / INDEX_FILE}: version={facts['version']} -> this code reads version "
            f"{INDEX_VERSION} -> prepare the corpus or write the index anew (launch.prepare index=)"
        )


def _map_table(path: Path, name: str, count: int, facts: dict[str, Any]) -> NDArray[np.uint32]:
    try:
        size = (path / name).stat().st_size
    except FileNotFoundError as err:
        raise _table_error(path, name, "is missing") from err
    if size != count * _UINT32.itemsize:
        raise _table_error(path, name, "is not the table that the index was written with")
    if not size:
        return np.zeros(0, _UINT32)
    table = np.memmap(path / name, _UINT32, "r").view(np.ndarray)  # quicker to index
    if size <= CHECKED_BYTES and digest_bytes(table.data) != facts["tables"][name]:
        raise _table_error(path, name, "is not the table that the index was written with")
    return table


def _table_error(path: Path, name: str, problem: str) -> ValueError:
    return ValueError(
        f"data set {path}: {name} {problem} -> samples would be looked for in wrong places -> "
        "restore it, or prepare the data again"
    )


def _check_size(path: Path, shard: Shard, allow_short: bool) -> None:
    try:
        found = os.stat(shard.url).st_size
    except FileNotFoundError as err:
        raise _mismatch(path, shard, "bytes", shard.num_bytes, "no such file") from err
    if found > shard.num_bytes or (found < shard.num_bytes and not allow_short):
        raise _mismatch(path, shard, "bytes", shard.num_bytes, found)


def _mismatch(path: Path, shard: Shard, what: str, expected: object, found: object) -> ValueError:
    return ValueError(
        f"data set {path}: the index and a shard disagree, {what} in the index {expected}, found "
        f"{found} -> its samples cannot be trusted -> restore the shard, or write its index again "
        f"(shard {Path(shard.url).name})"
    )
