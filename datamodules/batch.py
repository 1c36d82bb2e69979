"""The batches: the contract between data and models, and the only thing `modules` may import here.

Legend: B samples of this micro-batch, T predicted tokens of a sample.
"""

from typing import NotRequired, TypedDict

from torch import Tensor

IGNORED = -100
"""Target of a position where nothing is predicted; the value torch's cross entropy skips."""


class TextBatch(TypedDict):
    """Rows of text for a decoder: `targets[b, t]` is the token that follows `inputs[b, t]`.

    Rows that only pad the last batch of an evaluation have `IGNORED` in every target, so a metric
    that sums over targets other than `IGNORED` counts every sample exactly once.
    """

    inputs: Tensor  # int64 [B, T]
    targets: Tensor  # int64 [B, T], IGNORED where nothing is predicted
    documents: NotRequired[Tensor]  # int32 [B, T], number of the document within its row, from 0
