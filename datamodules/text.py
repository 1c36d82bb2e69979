"""Text for decoders: a corpus as a LightningDataModule whose stream resumes at the next sample."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from datamodules.corpora import TOKENIZER_FILE, Corpus, PreparedData
from datamodules.index import read_index
from datamodules.reader import BadSamples
from datamodules.rows import TextRows
from datamodules.stream import StreamDataModule
from datamodules.tokenization import load_tokenizer


class TextDataModule(StreamDataModule):
    """Rows of a corpus as `datamodules.batch.TextBatch`.

    Args:
        corpus: the text and how to prepare it.
        data_dir: folder of prepared data.
        sequence_length: predicted tokens of a row.
        document_mask: add the numbers of documents, so that attention stays inside them.
        on_bad_sample: `raise`, or `substitute` another one for a chunk that cannot be read.
        max_bad_samples: bad chunks that a process substitutes at most.
        stream: the rest, as in `datamodules.stream.StreamDataModule`.
    """

    def __init__(
        self,
        *,
        corpus: Corpus,
        data_dir: str,
        sequence_length: int,
        document_mask: bool,
        on_bad_sample: str,
        max_bad_samples: int,
        **stream: Any,
    ) -> None:
        super().__init__(**stream)
        self._corpus, self._data_dir = corpus, data_dir
        self._sequence_length, self._document_mask = sequence_length, document_mask
        self._on_bad_sample, self._max_bad_samples = on_bad_sample, max_bad_samples
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

    def source(self, split: str) -> TextRows:
        """Give the rows of a split.

        Raises:
            ValueError: there is no such split, or no row in it.
        """
        prepared = self._find()
        if prepared.facts["tokens"][split] is None:
            raise ValueError(
                f"corpus.{split}_fraction=0 -> {prepared.path} has no {split} split -> set a "
                "fraction above 0"
            )
        return TextRows(
            read_index(prepared.path / split, allow_short=self._on_bad_sample == "substitute"),
            sequence_length=self._sequence_length,
            document_mask=self._document_mask,
            seed=self._seed,
            bad_samples=self._bad_samples,
        )

    @property
    def _bad_samples(self) -> BadSamples:
        run = Path(self.trainer.default_root_dir) if self.trainer is not None else None
        list_file = run / "bad_samples.jsonl" if run else None
        return BadSamples(self._on_bad_sample, self._max_bad_samples, list_file)

    def _find(self) -> PreparedData:
        if self._prepared is None:
            self._prepared = self._corpus.prepare(self._data_dir)
        return self._prepared
