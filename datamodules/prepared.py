"""A corpus that was prepared elsewhere: a folder, or one in an object store.

Of a remote one the small files are copied, and its shards stay where they are: `origin` beside each
index says where. Shards are then read by blocks (`datamodules.block_cache`).
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.corpora import FACTS_FILE, TOKENIZER_FILE, PreparedData
from datamodules.index import INDEX_FILE, ORIGIN_FILE, digest_bytes, write_atomically
from datamodules.remote import is_remote


@dataclass(frozen=True, kw_only=True)
class PreparedCorpus:
    """A prepared corpus, in the places of a `datamodules.corpora.Corpus`.

    Args:
        name: first part of the name of the folder of copies.
        path: folder or url that `launch.prepare` has filled, or a copy of one.
        storage_options: of the fsspec file system.
    """

    name: str
    path: str
    storage_options: Mapping[str, Any]

    def prepare(self, data_dir: str | Path) -> PreparedData:
        """Find the corpus, and copy what is small from where it lies.

        Raises:
            ValueError: there is none, or a table is not the one that its index was written with.
        """
        source = _Remote(self.path, self.storage_options) if is_remote(self.path) else None
        if source is None:
            path, content = Path(self.path), self._read_facts(Path(self.path, FACTS_FILE))
        else:
            content = source.read(FACTS_FILE)
            path = Path(data_dir, f"{self.name}-{json.loads(content)['digest']}")
            if not (path / FACTS_FILE).exists():
                self._copy(source, path, content)
        return PreparedData(path, {"path": str(path), **json.loads(content)})

    def _read_facts(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as err:
            raise ValueError(
                f"corpus.path={self.path} -> there is no {FACTS_FILE} in it -> give a folder that "
                "launch.prepare has filled (its path is what it prints last)"
            ) from err

    def _copy(self, source: "_Remote", path: Path, facts: bytes) -> None:
        scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        (scratch / TOKENIZER_FILE).write_bytes(source.read(TOKENIZER_FILE))
        for split in json.loads(facts)["shards"]:
            folder = scratch / split
            folder.mkdir()
            index = source.read(f"{split}/{INDEX_FILE}")
            (folder / INDEX_FILE).write_bytes(index)
            (folder / ORIGIN_FILE).write_text(f"{source.url}/{split}\n")
            for table, digest in json.loads(index)["tables"].items():
                content = source.read(f"{split}/{table}")
                if digest_bytes(content) != digest:
                    raise ValueError(
                        f"corpus.path={self.path} -> {split}/{table} is not the table that the "
                        "index was written with -> upload the corpus again"
                    )
                (folder / table).write_bytes(content)
        write_atomically(scratch / FACTS_FILE, facts)
        path.mkdir(exist_ok=True)
        for child in sorted(scratch.iterdir(), key=lambda child: child.name == FACTS_FILE):
            target = path / child.name
            if child.is_dir():
                shutil.rmtree(target, ignore_errors=True)
            child.replace(target)
        scratch.rmdir()


class _Remote:
    """Small files below a url."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        import fsspec

        self.url = url.rstrip("/")
        try:
            self._system, self._root = fsspec.core.url_to_fs(self.url, **options)
        except ImportError as err:
            raise ValueError(
                f"corpus.path={url} -> {err} -> pip install 'trainyard[s3]' (or gcs, http)"
            ) from err

    def read(self, name: str) -> bytes:
        try:
            return self._system.cat_file(f"{self._root}/{name}")
        except FileNotFoundError as err:
            raise ValueError(
                f"corpus.path={self.url} -> there is no {name} in it -> upload a whole folder that "
                "launch.prepare has filled"
            ) from err
