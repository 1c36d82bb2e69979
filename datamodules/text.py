"""Text for decoders: a corpus as a LightningDataModule whose stream resumes at the next sample."""

import warnings
from typing import Any

from lightning.pytorch import LightningDataModule
from tokenizers import Tokenizer

from datamodules.corpora import TOKENIZER_FILE, Corpus, PreparedData
from datamodules.index import read_index
from datamodules.loader import EvaluationLoader, TrainLoader
from datamodules.rows import TextRows
from datamodules.tokenization import load_tokenizer


class TextDataModule(LightningDataModule):
    """Rows of a corpus as `datamodules.batch.TextBatch`.

    Args:
        corpus: the text and how to prepare it.
        data_dir: folder of prepared data.
        sequence_length: predicted tokens of a row.
        document_mask: add the numbers of documents, so that attention stays inside them.
        batch_samples: rows of an optimizer step, over all ranks.
        micro_batch: rows per rank and forward.
        max_samples: rows of the whole run, over all ranks.
        num_workers: processes that read ahead in training; 0 reads in the training process.
            Evaluation always reads there: a row is a slice of a memory map.
        repeat_first_batch: train on the rows of the first step again and again.
        window_mb: budget in MiB for the rows that the shuffle mixes at a time.
        seed: key of the order and of where rows begin.
        val_max_samples: rows of a validation, evenly spread over the split; None takes all.
    """

    def __init__(
        self,
        *,
        corpus: Corpus,
        data_dir: str,
        sequence_length: int,
        document_mask: bool,
        batch_samples: int,
        micro_batch: int,
        max_samples: int,
        num_workers: int,
        repeat_first_batch: bool,
        window_mb: int,
        seed: int,
        val_max_samples: int | None,
    ) -> None:
        super().__init__()
        self._corpus, self._data_dir = corpus, data_dir
        self._sequence_length, self._document_mask = sequence_length, document_mask
        self._batch_samples, self._micro_batch = batch_samples, micro_batch
        self._max_samples, self._num_workers = max_samples, num_workers
        self._window_mb, self._seed = window_mb, seed
        self._repeat_first_batch = repeat_first_batch
        self._val_max_samples = val_max_samples
        self._prepared: PreparedData | None = None
        self._train_loader: TrainLoader | None = None
        self._stream_state: dict[str, Any] = {}

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

    @property
    def seconds_waited(self) -> float:
        """Time that training has waited for batches in this process."""
        return self._train_loader.seconds_waited if self._train_loader else 0.0

    @property
    def epoch(self) -> int:
        """Passes over the data that training has completed."""
        return self._train_loader.epoch if self._train_loader else 0

    def train_dataloader(self) -> TrainLoader:
        """Give the rest of the run: shuffled rows, over as many epochs as it takes."""
        self._train_loader = TrainLoader(
            self._rows("train"),
            seed=self._seed,
            batch_samples=self._batch_samples,
            micro_batch=self._micro_batch,
            max_samples=self._max_samples,
            window_mb=self._window_mb,
            num_workers=self._num_workers,
            repeat_first_batch=self._repeat_first_batch,
            rank=self._rank,
            world_size=self._world_size,
        )
        if self._stream_state:
            self._train_loader.restore(self._stream_state)
        return self._train_loader

    def val_dataloader(self) -> EvaluationLoader:
        """Give the validation split, or `val_max_samples` rows of it, each row once."""
        return self._evaluation("val", self._val_max_samples)

    def test_dataloader(self) -> EvaluationLoader:
        """Give the test split, each row once."""
        return self._evaluation("test", None)

    def state_dict(self) -> dict[str, Any]:
        """Describe the next training sample in a few integers, the same on every rank."""
        if self._train_loader is not None:
            return self._train_loader.stream_state()
        return self._stream_state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the stream that the state describes, also in a loader that exists already.

        Raises:
            ValueError: the state belongs to another stream.
        """
        # Lightning looks for state in the loader itself, and warns where it finds none.
        warnings.filterwarnings("ignore", ".*your dataloader is not resumable", UserWarning)
        self._stream_state = state_dict
        if self._train_loader is not None:
            self._train_loader.restore(state_dict)

    def _find(self) -> PreparedData:
        if self._prepared is None:
            self._prepared = self._corpus.prepare(self._data_dir)
        return self._prepared

    def _evaluation(self, split: str, max_samples: int | None) -> EvaluationLoader:
        return EvaluationLoader(
            self._rows(split),
            micro_batch=self._micro_batch,
            max_samples=max_samples,
            rank=self._rank,
            world_size=self._world_size,
        )

    def _rows(self, split: str) -> TextRows:
        prepared = self._find()
        if prepared.facts["tokens"][split] is None:
            raise ValueError(
                f"corpus.{split}_fraction=0 -> {prepared.path} has no {split} split -> set a "
                "fraction above 0"
            )
        return TextRows(
            read_index(prepared.path / split),
            sequence_length=self._sequence_length,
            document_mask=self._document_mask,
            seed=self._seed,
        )

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1
