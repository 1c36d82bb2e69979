"""Shards as anybody might write them, and their index, without the writer of this repository."""

import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from webdataset.tariterators import group_by_keys, tar_file_expander

from datamodules.index import Index, Shard, ShardFacts, checksum, digest_file, read_index
from datamodules.index import write_index as write_index_file
from datamodules.tar import StoredSample, read_samples

BLOCK_SAMPLES = 2


def npy(values: Iterable[int], dtype: str) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(values, dtype))
    return file.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def stored_samples(path: Path) -> list[StoredSample]:
    content = path.read_bytes()
    samples, error = read_samples(content, 0, len(content))
    assert error is None
    # Behind the last sample the archive ends with blocks of zeros, which are not the sample's.
    samples[-1].stop = max(at + -(-size // 512) * 512 for at, size in samples[-1].members.values())
    return samples


def read_with_webdataset(path: Path) -> list[dict[str, Any]]:
    """Samples of a tar as stock webdataset groups them, `__key__` and members as bytes."""
    stream = io.BytesIO(path.read_bytes())
    samples = group_by_keys(tar_file_expander([{"url": path.name, "stream": stream}]))
    return [
        {name: value for name, value in sample.items() if name not in ("__url__", "__local_path__")}
        for sample in samples
    ]


def write_index(
    path: Path,
    schema: dict[str, dict[str, str]],
    lengths: Sequence[int] | None = None,
    documents: Sequence[int] = (),
) -> Index:
    """Index the tars of a folder.

    Args:
        path: the folder.
        schema: of its samples.
        lengths: tokens of each sample in a shard; None takes bytes.
        documents: tokens of each document in a shard.
    """
    facts = []
    for tar in sorted(path.glob("*.tar")):
        content, samples = tar.read_bytes(), stored_samples(tar)
        # Blocks begin where a sample begins, and the first one with the shard.
        begins = [0, *(sample.start for sample in samples[BLOCK_SAMPLES::BLOCK_SAMPLES])]
        ends = [*begins[1:], samples[-1].stop]
        blocks = [
            (len(samples[BLOCK_SAMPLES * n : BLOCK_SAMPLES * (n + 1)]), end - begin)
            for n, (begin, end) in enumerate(zip(begins, ends, strict=True))
        ]
        counts = (len(content), len(samples), len(blocks), len(documents))
        shard = Shard(tar.name, *counts, digest_file(tar))
        sizes = [sample.stop - sample.start for sample in samples]
        checksums = [checksum(content[sample.start : sample.stop]) for sample in samples]
        facts.append(ShardFacts(shard, blocks, lengths or sizes, checksums, documents))
    write_index_file(path, schema=schema, tokenizer=None, shards=facts)
    return read_index(path)
