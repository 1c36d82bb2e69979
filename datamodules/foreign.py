"""An index for tar shards that others wrote; no shard is changed.

Each shard is read by one process, which leaves what it found behind, so that a killed indexing is
finished by the next.
"""

import glob
import gzip
import json
import mmap
import os
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datamodules.index import (
    INDEX_FILE,
    INDEX_VERSION,
    ORIGIN_FILE,
    Shard,
    ShardFacts,
    checksum,
    digest_file,
    read_facts,
    write_atomically,
    write_index,
)
from datamodules.processes import run_tasks
from datamodules.remote import is_remote, is_sequential
from datamodules.tar import BadSampleError, StoredSample, check_members, read_samples
from datamodules.write import BLOCK_BYTES

SUFFIXES = (".tar", ".tar.gz", ".tgz")
_UNITS_FOLDER = "index.units"
_TAR_BLOCK = 512
_LARGEST = 2**32 - 1  # that the tables hold


@dataclass(frozen=True)
class ShardTask:
    """A shard to index.

    Attributes:
        path: of the shard.
        url: what the index calls it.
        identity: size in bytes and time of modification, by which a change is seen.
        facts: file that says that the shard is read and what it holds.
    """

    path: Path
    url: str
    identity: list[int]
    facts: Path

    @property
    def num_bytes(self) -> int:
        """Size of the shard."""
        return self.identity[0]


def index_shards(source: str | Sequence[str], out: str | None, num_processes: int | None) -> Path:
    """Write the index and tables of shards that exist, or find them written.

    Samples are grouped as webdataset does. The schema lists the extensions that they have; those
    that some samples lack are optional. A compressed shard is one block, whose bytes are those of
    the archive in it.

    Args:
        source: a folder of shards, a shard, a glob, or a list of these.
        out: folder of the index; None takes the one that the shards are in.
        num_processes: None takes a process per core.

    Returns:
        The folder of the index.

    Raises:
        ValueError: there are no shards, or one is damaged, cut short, or has a key twice; the
            message ends with shard and key, and gives the offset.
    """
    shards = list_shards(source)
    root = Path(os.path.commonpath([path.parent for path in shards]))
    folder = Path(out) if out else root
    urls = [path.relative_to(root).as_posix() for path in shards]
    sizes = [path.stat().st_size for path in shards]
    if _is_indexed(folder, root, list(zip(urls, sizes, strict=True))):
        return folder
    units = folder / _UNITS_FOLDER
    units.mkdir(parents=True, exist_ok=True)
    tasks = []
    for number, (path, url) in enumerate(zip(shards, urls, strict=True)):
        status = path.stat()
        identity = [status.st_size, status.st_mtime_ns]
        tasks.append(ShardTask(path, url, identity, units / f"{number:06d}.json"))
    run_tasks(_read_shard, tasks, num_processes, f"Indexing {root.name}", done=_is_read)
    found = [json.loads(task.facts.read_bytes()) for task in tasks]
    facts = [ShardFacts(**{**f["facts"], "shard": Shard(**f["facts"]["shard"])}) for f in found]
    (folder / INDEX_FILE).unlink(missing_ok=True)  # of other shards, until this one is complete
    if folder.resolve() != root.resolve():
        write_atomically(folder / ORIGIN_FILE, f"{root}\n".encode())
    else:
        (folder / ORIGIN_FILE).unlink(missing_ok=True)
    write_index(folder, schema=_merge_schemas(found), tokenizer=None, shards=facts)
    shutil.rmtree(units)
    return folder


def list_shards(source: str | Sequence[str], key: str = "index") -> list[Path]:
    """Find shards: those of a folder and of a glob by name, lists as they are.

    Args:
        source: as in `index_shards`.
        key: of the configuration that names them, for messages.

    Raises:
        ValueError: there are none, one is not local, or one comes twice.
    """
    found: list[Path] = []
    for name in [source] if isinstance(source, str) else source:
        if is_remote(name):
            raise ValueError(
                f"{key}={name} -> shards are read from their begin to their end -> do this where a "
                "copy of them is local, and put what is written where it is needed"
            )
        if Path(name).is_dir():
            paths = sorted(path for path in Path(name).iterdir() if path.name.endswith(SUFFIXES))
        else:
            # A name with brackets is a glob that does not match itself.
            names = [name] if Path(name).is_file() else sorted(glob.glob(name, recursive=True))
            paths = [Path(path) for path in names]
        if not paths:
            raise ValueError(
                f"{key}={name} -> there is no shard: no such file, or no file ending in "
                f"{', '.join(SUFFIXES)} -> give a folder, a glob, or a list of shards"
            )
        found += [Path(os.path.abspath(path)) for path in paths]
    if twice := [path for path, count in Counter(found).items() if count > 1]:
        raise ValueError(
            f"{key}={source} -> names {twice[0]} more than once -> its samples would be seen "
            "twice; name it once"
        )
    return found


def _is_indexed(folder: Path, root: Path, shards: list[tuple[str, int]]) -> bool:
    """Tell whether a folder has an index of these shards, by their place, names and sizes.

    Raises:
        ValueError: the index that it has was written by something else.
    """
    if not (folder / INDEX_FILE).exists():
        return False
    index, _ = read_facts(folder)
    origin = folder / ORIGIN_FILE
    base = Path(origin.read_text().strip()) if origin.exists() else folder
    known = [(shard["url"], shard["bytes"]) for shard in index["shards"]]
    is_same = base.resolve() == root.resolve() and known == shards
    return is_same and index["version"] == INDEX_VERSION


def _read_shard(task: ShardTask) -> None:
    with open_archive(task.path) as archive:
        samples = _find_samples(archive, task.path)
        if is_sequential(task.url) and samples:
            blocks = [(len(samples), len(archive))]
        else:
            blocks = _cut_blocks(samples)
        lengths = [sum(size for _, size in sample.members.values()) for sample in samples]
        checksums = [checksum(archive[s.start : s.stop]) for s in samples]
    if max((num_bytes for _, num_bytes in blocks), default=0) > _LARGEST:
        raise ValueError(
            f"index={task.path} -> more than 4 GiB in one block, which the index cannot say -> "
            "decompress the shard, or divide it"
        )
    shard = Shard(task.url, task.num_bytes, len(samples), len(blocks), 0, digest_file(task.path))
    content = {
        "identity": task.identity,
        "members": Counter(extension for sample in samples for extension in sample.members),
        "facts": asdict(ShardFacts(shard, blocks, lengths, checksums, [])),
    }
    write_atomically(task.facts, json.dumps(content).encode())


def _is_read(task: ShardTask) -> bool:
    return task.facts.exists() and json.loads(task.facts.read_bytes())["identity"] == task.identity


@contextmanager
def open_archive(path: Path) -> Iterator[memoryview]:
    """Map an archive into memory, decompressed in a temporary file where it is compressed."""
    with path.open("rb") as raw, tempfile.TemporaryFile() as unpacked:
        file = raw
        if is_sequential(path.name):
            try:
                shutil.copyfileobj(gzip.GzipFile(fileobj=raw), unpacked, 2**20)
            except (EOFError, gzip.BadGzipFile, zlib.error) as err:
                raise ValueError(
                    f"shard {path} -> cannot be decompressed after {unpacked.tell()} bytes of the "
                    f"archive ({err}) -> it is damaged or cut short: restore it"
                ) from err
            unpacked.flush()
            file = unpacked
        if not os.fstat(file.fileno()).st_size:
            raise ValueError(f"shard {path} -> the file is empty -> restore it, or leave it out")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with mapped, memoryview(mapped) as archive:
            yield archive


def _find_samples(archive: memoryview, path: Path) -> list[StoredSample]:
    """Group an archive into samples, each complete, of a key of its own."""
    samples, error = read_samples(archive, 0, len(archive))
    if error is not None:
        place = f"behind key {samples[-1].key}" if samples else "before the first key"
        raise ValueError(f"index: {error} (shard {path.name}, {place})") from error
    if not samples:
        return []
    last, keys = samples[-1], set()
    if last.stop >= len(archive) or any(archive[-_TAR_BLOCK:]):
        raise ValueError(
            f"index: no end-of-archive block at byte {len(archive)} -> the shard is cut short -> "
            f"restore it (shard {path.name}, behind key {last.key})"
        )
    for sample in samples:
        try:
            check_members(sample, {})
        except BadSampleError as err:
            raise ValueError(f"index: {err} (shard {path.name}, key {sample.key})") from err
        if sample.key in keys:
            raise ValueError(
                f"index: a second sample of the same key at byte {sample.start} -> members of one "
                "sample do not follow each other, or two samples share a name -> write the shard "
                f"sorted by name (shard {path.name}, key {sample.key})"
            )
        keys.add(sample.key)
    return samples


def _cut_blocks(samples: list[StoredSample]) -> list[tuple[int, int]]:
    """Cut a shard into blocks as `ShardWriter` does, and give samples and bytes of each."""
    blocks, start, first = [], 0, 0
    for number, sample in enumerate(samples, start=1):
        if sample.stop - start >= BLOCK_BYTES or number == len(samples):
            blocks.append((number - first, sample.stop - start))
            start, first = sample.stop, number
    return blocks


def _merge_schemas(found: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    num_samples = sum(shard["facts"]["shard"]["num_samples"] for shard in found)
    counts: Counter[str] = Counter()
    for shard in found:
        counts.update(shard["members"])
    return {
        extension: {"codec": extension.rpartition(".")[2]}
        | ({} if counts[extension] == num_samples else {"optional": "true"})
        for extension in sorted(counts)
    }
