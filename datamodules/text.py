"""Text for decoders: a corpus as a LightningDataModule whose stream resumes at the next sample."""

from typing import Any

from datamodules.corpus_stream import CorpusDataModule
from datamodules.index import Index
from datamodules.pack import PackedRows
from datamodules.rows import TextRows
from datamodules.settings import check_choice
from datamodules.workers import SampleSource

PACKINGS = ("cut", "best_fit")


class TextDataModule(CorpusDataModule):
    """Rows of a corpus as `datamodules.batch.TextBatch`.

    Args:
        sequence_length: predicted tokens of a row.
        packing: `cut`: rows are cut from the text end to end; `best_fit`: whole documents packed
            into rows (`datamodules.pack`), always with their numbers.
        document_mask: add the numbers of documents, so that attention stays inside them.
        corpus_stream: the rest, as in `datamodules.corpus_stream.CorpusDataModule`.
    """

    def __init__(
        self, *, sequence_length: int, packing: str, document_mask: bool, **corpus_stream: Any
    ) -> None:
        super().__init__(**corpus_stream)
        check_choice("packing", packing, PACKINGS)
        if not isinstance(sequence_length, int) or sequence_length < 1:
            raise ValueError(
                f"datamodule.sequence_length={sequence_length} -> it is a whole number -> use 1 or "
                "more"
            )
        self._sequence_length, self._document_mask = sequence_length, document_mask
        self._packing = packing

    def samples_of(self, split: str, index: Index) -> SampleSource:
        """Give the rows of a data set."""
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
