"""A LightningDataModule of a prepared corpus, or of several in a blend; kinds of data extend it."""

from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

from tokenizers import Tokenizer

from datamodules.blend import BlendOrder
from datamodules.facts import TEXT, TOKENIZER_FILE, PreparedData
from datamodules.index import Index, join_indexes, read_index
from datamodules.loader import order_of
from datamodules.order import RunOrder
from datamodules.stream import StreamDataModule
from datamodules.tokenization import load_tokenizer
from datamodules.workers import SampleSource


class Preparable(Protocol):
    """What can be prepared: `datamodules.corpora.Corpus`, and what takes its place."""

    def prepare(self, data_dir: str | Path) -> PreparedData:
        """Prepare it below `data_dir`, or find it there."""
        ...


class CorpusDataModule(StreamDataModule):
    """Batches of a corpus; extended by a kind of data with `samples_of`, and `kind` of the corpus.

    Args:
        corpus: the data and how to prepare it.
        data_dir: folder of prepared data.
        stream: the rest, as in `datamodules.stream.StreamDataModule`.
    """

    kind: ClassVar[str] = TEXT

    def __init__(self, *, corpus: Preparable, data_dir: str, **stream: Any) -> None:
        super().__init__(**stream)
        self._corpus, self._data_dir = corpus, data_dir
        self._prepared: PreparedData | None = None

    def samples_of(self, split: str, index: Index) -> SampleSource:
        """Give the samples of a split, or in a blend of one source of it, by their index."""
        raise NotImplementedError

    def prepare_data(self) -> None:
        """Write the corpus into shards, where that has not been done."""
        self._corpus.prepare(self._data_dir)

    def setup(self, stage: str) -> None:
        """Find the prepared data, on every rank.

        Raises:
            ValueError: it is of another kind, or none that the settings can be used with.
        """
        self._find()

    def check_data(self, prepared: PreparedData) -> None:
        """Refuse data that cannot be used, by its facts; extended by kinds of data that know more.

        Raises:
            ValueError: the data is of another kind.
        """
        if prepared.kind != self.kind:
            raise ValueError(
                f"datamodule={self.kind} -> the corpus has {prepared.kind}, in {prepared.path} -> "
                f"set datamodule={prepared.kind} and a module for it, or take a corpus of "
                f"{self.kind}"
            )

    @property
    def facts(self) -> dict[str, Any]:
        """What the prepared data is; see `datamodules.corpora.PreparedData`."""
        return self._find().facts

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the prepared data."""
        return load_tokenizer(self._find().path / TOKENIZER_FILE)

    @cached_property
    def target_tokenizer(self) -> Tokenizer:
        """The tokenizer of what is predicted; the same, where a kind of data has no other."""
        return self.tokenizer

    def source(self, split: str) -> SampleSource:
        """Give the samples of a split, those of a blend's sources behind each other.

        Raises:
            ValueError: there is no such split, or no sample in it.
        """
        folders = self._folders(split)
        if not folders:
            raise ValueError(
                f"corpus.{split}_fraction=0 -> {self._find().path} has no {split} split -> set a "
                "fraction above 0"
            )
        return self._samples(split, *folders.values())

    def order(self, source: SampleSource) -> RunOrder:
        """Give the order of training; that of a blend mixes its sources."""
        weights = {n: part["weight"] for n, part in self.facts.get("sources", {}).items()}
        if not weights:
            return super().order(source)
        if self._tail == "pad_mask":
            raise ValueError(
                "datamodule.tail=pad_mask -> the epochs of a blend's sources end anywhere in a "
                "step -> use drop or carry"
            )
        parts = {n: self._samples("train", path) for n, path in self._folders("train").items()}
        total = sum(weights.values())
        orders = {
            name: order_of(
                part,
                seed=self._seed,
                batch_samples=self._batch_samples,
                window_mb=self._window_mb * weights[name] / total,
                tail=self._tail,
                in_blend=True,
            )
            for name, part in parts.items()
        }
        blocks = {name: len(part.samples_per_block) for name, part in parts.items()}
        return BlendOrder(orders, weights, blocks, seed=self._seed)

    def _folders(self, split: str) -> dict[str, Path]:
        """Where the shards of a split are, by the name of a blend's source."""
        prepared = self._find()
        sources = prepared.facts.get("sources", {"": {"path": prepared.path}})
        folders = {name: Path(part["path"], split) for name, part in sources.items()}
        return {name: folder for name, folder in folders.items() if folder.exists()}

    def _samples(self, split: str, *folders: Path) -> SampleSource:
        allow_short = self.bad_samples.action == "substitute"
        indexes = [read_index(folder, allow_short=allow_short) for folder in folders]
        index = indexes[0] if len(indexes) == 1 else join_indexes(indexes)
        return self.samples_of(split, index)

    def _find(self) -> PreparedData:
        if self._prepared is None:
            prepared = self._corpus.prepare(self._data_dir)
            self.check_data(prepared)
            self._prepared = prepared
        return self._prepared
