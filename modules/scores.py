"""Scores of generated text against references, by the libraries that papers report them with."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch.distributed as dist

from datamodules.batch import IGNORED, PairBatch

Row = tuple[str, str, str]
"""Source, target as written, prediction."""

SCORES = ("bleu", "chrf", "rouge")
TOKENIZATIONS = ("13a", "intl", "zh", "char", "none")
"""Of sacreBLEU, those that need no more packages."""
_ROUGE_KINDS = ("rouge1", "rouge2", "rougeL")


def check_scores(names: Sequence[str], bleu_tokenize: str) -> None:
    """Check `module.scores`.

    Raises:
        ValueError: A name is unknown.
    """
    if bleu_tokenize not in TOKENIZATIONS:
        raise ValueError(
            f"module.scores.bleu_tokenize={bleu_tokenize} -> unknown -> choose one of "
            f"{', '.join(TOKENIZATIONS)}"
        )
    for name in names:
        if name not in SCORES:
            raise ValueError(
                f"module.scores.names={list(names)} -> {name} is unknown -> choose out of "
                f"{', '.join(SCORES)}, or [] for none"
            )


def texts_of(batch: PairBatch, tokenizer: Any, target_tokenizer: Any) -> list[tuple[str, str]]:
    """Texts of sources and targets from their tokens, special ones visible."""
    pairs = zip(batch["source"], batch["source_mask"], batch["targets"], strict=True)
    return [
        (
            tokenizer.decode(source[mask].tolist(), skip_special_tokens=False),
            target_tokenizer.decode(
                targets[targets != IGNORED].tolist(), skip_special_tokens=False
            ),
        )
        for source, mask, targets in pairs
    ]


def gather_rows(rows: list[Row]) -> list[Row]:
    """Bring the rows of all ranks to each of them, in the order of the data set.

    Of R ranks the r-th has every R-th sample from the r-th on.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, rows)
    return [row for rows in zip_longest(*gathered) for row in rows if row is not None]


def score(
    rows: Sequence[Row], names: Sequence[str], bleu_tokenize: str
) -> tuple[dict[str, float], dict[str, str]]:
    """Score predictions as a whole corpus.

    * `bleu`: sacreBLEU, 0 to 100, of raw text, with its own tokenization (Post 2018, arXiv
      1804.08771; Papineni et al. 2002).
    * `chrf`: chrF2 of sacreBLEU, 0 to 100 (Popovic 2015).
    * `rouge`: F-measures of ROUGE-1, -2 and -L by `rouge_score` with stemming, 0 to 100, means over
      the rows (Lin 2004). Its words are of a to z and digits alone: no score for other scripts.

    Args:
        rows: At least one.
        names: Out of `SCORES`.
        bleu_tokenize: As sacreBLEU names it: `13a` for most languages, `zh`, `char`, `intl`, ...

    Returns:
        The values by name (`rouge` gives three), and by name what says how they were computed:
        the signatures of sacreBLEU, and for ROUGE its version.
    """
    from sacrebleu.metrics.bleu import BLEU  # takes a tenth of a second, and few runs need it
    from sacrebleu.metrics.chrf import CHRF

    predictions, references = [row[2] for row in rows], [[row[1] for row in rows]]
    values, signatures = {}, {}
    for name, metric in (("bleu", BLEU(tokenize=bleu_tokenize)), ("chrf", CHRF())):
        if name in names:
            values[name] = float(metric.corpus_score(predictions, references).score)
            signatures[name] = str(metric.get_signature())
    if "rouge" in names:
        rouge, signatures["rouge"] = _rouge(rows)
        values |= rouge
    return values, signatures


def _rouge(rows: Sequence[Row]) -> tuple[dict[str, float], str]:
    from importlib.metadata import version

    from rouge_score.rouge_scorer import RougeScorer  # takes a second

    scorer = RougeScorer(_ROUGE_KINDS, use_stemmer=True)
    found = [scorer.score(target, prediction) for _, target, prediction in rows]
    means = {
        kind: 100 * sum(each[kind].fmeasure for each in found) / len(rows) for kind in _ROUGE_KINDS
    }
    return means, f"rouge_score:{version('rouge_score')}|stemmer:yes|f-measure"


class Generated:
    """What an evaluation generates, and how well.

    Args:
        names: Scores out of `SCORES`, where the data has texts.
        bleu_tokenize: Out of `TOKENIZATIONS`.
        max_samples: Samples to generate in a validation while training; None for all.
        num_rows: Of them to show; without scores no more are generated than a batch that has them.

    Raises:
        ValueError: A name is unknown.
    """

    def __init__(
        self, *, names: Sequence[str], bleu_tokenize: str, max_samples: int | None, num_rows: int
    ):
        check_scores(names, bleu_tokenize)
        self.names, self.bleu_tokenize = names, bleu_tokenize
        self.max_samples, self.num_rows = max_samples, num_rows
        self.rows: list[Row] = []
        """Of the last evaluation, in the order of the data set."""
        self.signatures: dict[str, str] = {}
        """How its scores were computed, by name."""
        self._own: list[Row] = []
        self._is_scored, self._limit = False, None

    def has_room(self, num_before: int, batch: PairBatch, *, is_training: bool) -> bool:
        """Whether to generate for a batch, the same on all ranks.

        Args:
            num_before: Samples of all ranks in the batches before.
            batch: Of pairs.
            is_training: Whether it is a validation while training.
        """
        self._is_scored = "texts" in batch and bool(self.names)
        self._limit = self.num_rows
        if self._is_scored:
            self._limit = self.max_samples if is_training else None
        return self._limit is None or num_before < self._limit

    def add(self, batch: PairBatch, sequences: list[list[int]], data: Any) -> None:
        """Keep what was generated for a batch; `data` has `tokenizer` and `target_tokenizer`."""
        texts, is_text = batch.get("texts"), "texts" in batch  # else special tokens are seen, too
        predictions = data.target_tokenizer.decode_batch(sequences, skip_special_tokens=is_text)
        texts = texts or texts_of(batch, data.tokenizer, data.target_tokenizer)
        is_sample = (batch["targets"] != IGNORED).any(1).tolist()  # others only fill up
        rows = zip(texts, predictions, is_sample, strict=True)
        self._own += [(*text, prediction) for text, prediction, is_one in rows if is_one]

    def finish(self) -> dict[str, float]:
        """Bring the rows of all ranks together and score them."""
        self.rows, self._own = gather_rows(self._own)[: self._limit], []
        if not (self._is_scored and self.rows):
            return {}
        values, self.signatures = score(self.rows, self.names, self.bleu_tokenize)
        return values
