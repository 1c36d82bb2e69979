"""Text for decoders: a corpus as a LightningDataModule whose stream resumes at the next sample."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from datamodules.blend import Blend, BlendOrder
from datamodules.corpora import Corpus
from datamodules.facts import TOKENIZER_FILE, PreparedData
from datamodules.index import Index, join_indexes, read_index
from datamodules.loader import order_of
from datamodules.order import RunOrder
from datamodules.pack import PackedRows
from datamodules.rows import TextRows
from datamodules.settings import check_choice
from datamodules.stream import StreamDataModule
from datamodules.tokenization import load_tokenizer
from datamodules.workers import SampleSource

PACKINGS = ("cut", "best_fit")


class TextDataModule(StreamDataModule):
    """Rows of a corpus as `datamodules.batch.TextBatch`.

    Args:
        corpus: the text and how to prepare it.
        data_dir: folder of prepared data.
        sequence_length: predicted tokens of a row.
        packing: `cut`: rows are cut from the text end to end; `best_fit`: whole documents packed
            into rows (`datamodules.pack`), always with their numbers.
        document_mask: add the numbers of documents, so that attention stays inside them.
        stream: the rest, as in `datamodules.stream.StreamDataModule`.
    """

    def __init__(
        self,
        *,
        corpus: Corpus | Blend,
        data_dir: str,
        sequence_length: int,
        packing: str,
        document_mask: bool,
        **stream: Any,
    ) -> None:
        super().__init__(**stream)
        check_choice("packing", packing, PACKINGS)
        if not isinstance(sequence_length, int) or sequence_length < 1:
            raise ValueError(
                f"datamodule.sequence_length={sequence_length} -> it is a whole number -> use 1 or "
                "more"
            )
        self._corpus, self._data_dir = corpus, data_dir
        self._sequence_length, self._document_mask = sequence_length, document_mask
        self._packing = packing
        self._prepared: PreparedData | None = None

    def prepare_data(self) -> None:
        """Tokenize the corpus into shards, where that has not been done."""
        self._corpus.prepare(self._data_dir)

    def setup(self, stage: str) -> None:
        """Find the prepared data, on every rank."""
        self._find()

    @property
    def facts(self) -> dict[str, Any]:
        """What the prepared data is; see `datamodules.corpora.PreparedData`."""
        return self._find().facts

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the prepared data."""
        return load_tokenizer(self._find().path / TOKENIZER_FILE)

    def source(self, split: str) -> SampleSource:
        """Give the rows of a split, those of a blend's sources behind each other.

        Raises:
            ValueError: there is no such split, or no row in it.
        """
        folders = self._folders(split)
        if not folders:
            raise ValueError(
                f"corpus.{split}_fraction=0 -> {self._find().path} has no {split} split -> set a "
                "fraction above 0"
            )
        return self._rows(*folders.values())

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
        rows = {name: self._rows(path) for name, path in self._folders("train").items()}
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
            for name, part in rows.items()
        }
        blocks = {name: len(part.samples_per_block) for name, part in rows.items()}
        return BlendOrder(orders, weights, blocks, seed=self._seed)

    def _folders(self, split: str) -> dict[str, Path]:
        """Where the shards of a split are, by the name of a blend's source."""
        prepared = self._find()
        sources = prepared.facts.get("sources", {"": {"path": prepared.path}})
        folders = {name: Path(part["path"], split) for name, part in sources.items()}
        return {name: folder for name, folder in folders.items() if folder.exists()}

    def _rows(self, *folders: Path) -> SampleSource:
        allow_short = self.bad_samples.action == "substitute"
        indexes = [read_index(folder, allow_short=allow_short) for folder in folders]
        index = indexes[0] if len(indexes) == 1 else join_indexes(indexes)
        if self._packing == "best_fit":
            return self._packed(index)
        return TextRows(
            index,
            sequence_length=self._sequence_length,
            document_mask=self._document_mask,
            seed=self._seed,
            bad_samples=self.bad_samples,
            cache=self.cache_for(index),
        )

    def _packed(self, index: Index) -> PackedRows:
        if (end_token := self.facts["end_token"]) is None:
            raise ValueError(
                "datamodule.packing=best_fit -> the corpus is one document -> use packing=cut"
            )
        return PackedRows(
            index,
            sequence_length=self._sequence_length,
            end_token=end_token,
            bad_samples=self.bad_samples,
            cache=self.cache_for(index),
        )

    def _find(self) -> PreparedData:
        if self._prepared is None:
            self._prepared = self._corpus.prepare(self._data_dir)
        return self._prepared
