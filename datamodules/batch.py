"""The batches: the contract between data and models, and the only thing `modules` may import here.

Legend: B samples of this micro-batch, T predicted tokens of a sample, S tokens of a source; images
have C channels, H rows and W columns.
"""

from typing import NotRequired, TypedDict

from torch import Tensor

IGNORED = -100
"""Target of a position where nothing is predicted; the value torch's cross entropy skips."""


class TextBatch(TypedDict):
    """Rows of text for a decoder: `targets[b, t]` is the token that follows `inputs[b, t]`.

    Both may be views of the same memory, so that neither is contiguous nor to be written into.

    Rows that only pad the last batch of an evaluation have `IGNORED` in every target, so a metric
    that sums over targets other than `IGNORED` counts every sample exactly once.
    """

    inputs: Tensor  # int64 [B, T]
    targets: Tensor  # int64 [B, T], IGNORED where nothing is predicted
    documents: NotRequired[Tensor]  # int32 [B, T], number of the document within its row, from 0


class PairBatch(TypedDict):
    """Sources and targets for an encoder-decoder, each padded to the longest of the micro-batch.

    `targets[b, t]` is the token that follows `inputs[b, t]`; `inputs` begins with the start token.
    Rows that only pad the last batch of an evaluation have `IGNORED` in every target.

    Targets differ in number between micro-batches and ranks, which are averaged as equals. A summed
    loss over `divisor`, which is planned before anything is read and is the same in all
    micro-batches of a step on all ranks, makes that average the mean over the step's targets.
    """

    source: Tensor  # int64 [B, S]
    source_mask: Tensor  # bool [B, S], false at padding
    inputs: Tensor  # int64 [B, T]
    targets: Tensor  # int64 [B, T], IGNORED at padding
    divisor: NotRequired[Tensor]  # fp32 [], the step's targets over its micro-batches; in training
    texts: NotRequired[list[tuple[str, str]]]  # B times source and target as written; to score by


class ImageBatch(TypedDict):
    """Images for a GAN, as they are stored: 0 is black, 255 white or a full colour."""

    images: Tensor  # uint8 [B, C, H, W]
    labels: NotRequired[Tensor]  # int64 [B], where the data has any


class KeyedImageBatch(ImageBatch):
    """Images in training, each with a key that all is a function of that is random about it.

    Noise and augmentation drawn from keys are the same on any number of ranks and after any resume;
    in another epoch an image has another key.
    """

    keys: Tensor  # int64 [B]


class CountedImageBatch(ImageBatch):
    """Images in evaluation; those that only pad the last batch do not count."""

    counted: Tensor  # bool [B]
