"""A corpus that was prepared elsewhere: a folder, or one in an object store.

Of a remote one the small files are copied, and its shards stay where they are: `origin` beside each
index says where. Shards are then read by blocks (`datamodules.block_cache`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datamodules.facts import (
    FACTS_FILE,
    IMAGES,
    TARGET_TOKENIZER_FILE,
    TEXTS_FILE,
    TOKENIZER_FILE,
    PreparedData,
)
from datamodules.index import INDEX_FILE, ORIGIN_FILE, digest_bytes, write_atomically
from datamodules.processes import exclusive
from datamodules.remote import is_remote


class PreparedCorpus:
    """A prepared corpus, in the places of a `datamodules.corpora.Corpus`.

    Args:
        name: first part of the name of the folder of copies.
        path: folder or url that `launch.prepare` has filled, or a copy of one.
        storage_options: of the fsspec file system.
        expected: settings of the preparation, as an experiment gives them for its corpus
            (`tokenizer`, `vocab_size`, ...): what was prepared must have been prepared so.
    """

    def __init__(
        self, *, name: str, path: str, storage_options: Mapping[str, Any], **expected: Any
    ) -> None:
        self.name, self.path, self.storage_options = name, path, storage_options
        self._expected = expected

    def prepare(self, data_dir: str | Path) -> PreparedData:
        """Find the corpus, and copy what is small from where it lies.

        Raises:
            ValueError: there is none, it was prepared with other settings than are expected, or a
                file is not the one that it was written with.
        """
        source = _Remote(self.path, self.storage_options) if is_remote(self.path) else None
        content = source.read(FACTS_FILE) if source else self._read_facts()
        facts, path = json.loads(content), Path(self.path)
        self._compare(facts["settings"])
        if source is not None:
            path = Path(data_dir, f"{self.name}-{facts['digest']}")
            with exclusive(path.with_name(f".{path.name}.lock")):
                if not (path / FACTS_FILE).exists():
                    self._copy(source, path, content)
        return PreparedData(path, {"path": str(path), **facts})

    def _compare(self, settings: Mapping[str, Any]) -> None:
        for key, value in self._expected.items():
            if key not in settings or settings[key] != value:
                found = f"it is {settings[key]}" if key in settings else "there is no such setting"
                raise ValueError(
                    f"corpus.{key}={value} -> of the data prepared in {self.path} {found} -> "
                    f"prepare it anew, give what it has, or leave this out by '~corpus.{key}'"
                )

    def _read_facts(self) -> bytes:
        try:
            return Path(self.path, FACTS_FILE).read_bytes()
        except OSError as err:
            raise ValueError(
                f"corpus.path={self.path} -> there is no {FACTS_FILE} in it -> give a folder that "
                "launch.prepare has filled (its path is what it prints last)"
            ) from err

    def _copy(self, source: "_Remote", path: Path, facts: bytes) -> None:
        path.mkdir(exist_ok=True)
        known = json.loads(facts)
        if known.get("kind") != IMAGES:
            write_atomically(path / TOKENIZER_FILE, source.read(TOKENIZER_FILE))
        if not known.get("is_joint", True):
            write_atomically(path / TARGET_TOKENIZER_FILE, source.read(TARGET_TOKENIZER_FILE))
        for split in known["shards"]:
            folder = path / split
            folder.mkdir(exist_ok=True)
            index = source.read(f"{split}/{INDEX_FILE}")
            write_atomically(folder / ORIGIN_FILE, f"{source.url}/{split}\n".encode())
            files = json.loads(index)["tables"]
            if texts := known.get("texts", {}).get(split):
                files |= {TEXTS_FILE: texts}
            for name, digest in files.items():
                content = source.read(f"{split}/{name}")
                if digest_bytes(content) != digest:
                    raise ValueError(
                        f"corpus.path={self.path} -> {split}/{name} is not the file that the "
                        "corpus was written with -> upload the corpus again"
                    )
                write_atomically(folder / name, content)
            write_atomically(folder / INDEX_FILE, index)
        # Last, since its presence says that the rest is complete.
        write_atomically(path / FACTS_FILE, facts)


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
