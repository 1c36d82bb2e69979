"""Pairs for encoder-decoders: a corpus as a LightningDataModule whose stream resumes."""

import json
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from datamodules.corpus_stream import CorpusDataModule
from datamodules.facts import PAIRS, TARGET_TOKENIZER_FILE, TEXTS_FILE
from datamodules.index import Index, digest_bytes
from datamodules.pair_plan import LONGER, PairPlan
from datamodules.pair_rows import PairRows
from datamodules.settings import check_choice
from datamodules.tokenization import load_tokenizer


class PairDataModule(CorpusDataModule):
    """Pairs of a corpus as `datamodules.batch.PairBatch`.

    Evaluation takes pairs one by one, without groups, so that each is scored once, and gives their
    texts. Pairs that are too long for the model are cut there where training drops them: a score
    without the longest pairs would be that of an easier test.

    Args:
        max_source_tokens: of a source, its end token among them.
        max_target_tokens: of a target, likewise.
        longer: what becomes of pairs that pass one of the two: `raise`, `drop`, or `cut`, which
            keeps the end token.
        group_tokens: None: a sample of training is a pair; else a group of pairs of similar length,
            whose padded tokens, of sources and targets together, are this many at most.
        eval_pairs: pairs per rank and forward in evaluation.
        corpus_stream: the rest, as in `datamodules.corpus_stream.CorpusDataModule`.
    """

    kind = PAIRS

    def __init__(
        self,
        *,
        max_source_tokens: int,
        max_target_tokens: int,
        longer: str,
        group_tokens: int | None,
        eval_pairs: int,
        **corpus_stream: Any,
    ) -> None:
        super().__init__(**corpus_stream)
        check_choice("longer", longer, LONGER)
        # An end token and something before it: what is cut to less says nothing.
        for side, limit in (("source", max_source_tokens), ("target", max_target_tokens)):
            if limit < 2:
                raise ValueError(
                    f"datamodule.max_{side}_tokens={limit} -> its end token is one of them -> "
                    "use 2 or more"
                )
        self._limits = {
            "max_source_tokens": max_source_tokens,
            "max_target_tokens": max_target_tokens,
        }
        self._longer, self._group_tokens, self._eval_pairs = longer, group_tokens, eval_pairs

    @cached_property
    def target_tokenizer(self) -> Tokenizer:
        """The tokenizer of the targets; that of the sources where the vocabulary is joint."""
        if self.facts["is_joint"]:
            return self.tokenizer
        return load_tokenizer(self._find().path / TARGET_TOKENIZER_FILE)

    @property
    def eval_micro_batch(self) -> int:
        """Pairs per rank and forward in evaluation."""
        return self._eval_pairs

    def samples_of(self, split: str, index: Index) -> PairRows:
        """Give the pairs of a data set; those of val and test with their texts.

        Raises:
            ValueError: pairs are too long, or the texts are not those which were prepared.
        """
        is_training = split == "train"
        plan = PairPlan(
            index,
            **self._limits,
            longer="cut" if self._longer == "drop" and not is_training else self._longer,
            group_tokens=self._group_tokens if is_training else None,
            seed=self._seed,
        )
        return PairRows(
            index,
            plan,
            start_token=self.facts["start_token"],
            end_token=self.facts["end_token"],
            target_end_token=self.facts["target_end_token"],
            texts=None if is_training else self._texts(split, index, plan.num_pairs),
            bad_samples=self.bad_samples,
            cache=self.cache_for(index),
        )

    def _texts(self, split: str, index: Index, num_pairs: int) -> list[tuple[str, str]]:
        """Read source and target of each pair as written."""
        path, content = index.path / TEXTS_FILE, b""
        if path.exists():
            content = path.read_bytes()
        texts = [tuple(json.loads(line)) for line in content.splitlines()]
        if digest_bytes(content) != self.facts["texts"][split] or len(texts) != num_pairs:
            raise ValueError(
                f"data set {index.path}: {TEXTS_FILE} is missing or not as it was written, with a "
                f"text for each of {num_pairs:,} pairs -> scores would compare with other texts -> "
                "prepare the corpus again"
            )
        return texts
