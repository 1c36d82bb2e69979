"""Scores of generated text against references, by the libraries that papers report them with."""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from datamodules.batch import IGNORED, PairBatch

Row = tuple[str, str, str]
"""Source, target as written, prediction."""

SCORES = ("bleu", "chrf", "rouge")
_ROUGE_KINDS = ("rouge1", "rouge2", "rougeL")


def check_scores(names: Sequence[str]) -> None:
    """Check `module.scores.names`.

    Raises:
        ValueError: One of them is unknown.
    """
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
    """Bring the rows of all ranks to each of them, in the order of the ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, rows)
    return [row for part in gathered for row in part]


def score(rows: Sequence[Row], names: Sequence[str]) -> tuple[dict[str, float], dict[str, str]]:
    """Score predictions as a whole corpus.

    * `bleu`: sacreBLEU, 0 to 100, of raw text, with its own tokenization `13a` (Post 2018, arXiv
      1804.08771; Papineni et al. 2002).
    * `chrf`: chrF2 of sacreBLEU, 0 to 100 (Popovic 2015).
    * `rouge`: F-measures of ROUGE-1, -2 and -L by `rouge_score` with stemming, 0 to 100, means over
      the rows (Lin 2004).

    Args:
        rows: At least one.
        names: Out of `SCORES`.

    Returns:
        The values by name (`rouge` gives three), and by name what says how they were computed:
        the signatures of sacreBLEU, and for ROUGE its version.
    """
    from sacrebleu.metrics.bleu import BLEU  # takes a tenth of a second, and few runs need it
    from sacrebleu.metrics.chrf import CHRF

    predictions, references = [row[2] for row in rows], [[row[1] for row in rows]]
    values, signatures = {}, {}
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
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
