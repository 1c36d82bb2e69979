"""What recurrent encoder-decoders look like: shapes, named presets, and overrides of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Size

from modules.presets import refuse_unknown


@dataclass(frozen=True, kw_only=True)
class RecurrentShape:
    """What a recurrent encoder-decoder looks like, apart from its vocabularies.

    Attributes:
        cell: `lstm` (Hochreiter and Schmidhuber 1997, with forget gates) or `gru` (Cho et al. 2014,
            arXiv 1406.1078), both as torch has them.
        num_layers: L, of the encoder and of the decoder.
        embedding_width: E, of tokens on both sides.
        encoder_width: W, size of the encoder's state in each of its two directions.
        hidden_width: H, size of the decoder's state, and of what attention compares.
        attention: `additive` (Bahdanau et al. 2015, arXiv 1409.0473), or `none`: then the decoder
            knows of the source what its first state holds (Sutskever et al. 2014, arXiv 1409.3215).
        dropout: Probability, on embeddings and between layers.
    """

    cell: Literal["lstm", "gru"]
    num_layers: int
    embedding_width: int
    encoder_width: int
    hidden_width: int
    attention: Literal["additive", "none"]
    dropout: float

    def __post_init__(self):
        refuse_unknown(self, {"cell": ("lstm", "gru"), "attention": ("additive", "none")})

    @property
    def num_gates(self) -> int:
        """Linear maps in a cell."""
        return 4 if self.cell == "lstm" else 3

    @property
    def states(self) -> tuple[str, ...]:
        """What a layer hands on from step to step."""
        return ("hidden", "cell") if self.cell == "lstm" else ("hidden",)

    @property
    def memory_width(self) -> int:
        """M, size of what the encoder makes of a token."""
        return 2 * self.encoder_width


PRESETS: dict[str, RecurrentShape] = {
    # Between the two vocabularies of Multi30k, 7,853 and 5,893, 13.9M parameters: as many as the
    # usual tutorial's, whose encoder reads forward only, has no bridge, and is 512 wide.
    "lstm_small": RecurrentShape(
        cell="lstm", num_layers=2, embedding_width=256, encoder_width=256, hidden_width=512,
        attention="none", dropout=0.5,
    ),
    # The usual tutorial's, parameter for parameter: 20.5M.
    "gru_attention": RecurrentShape(
        cell="gru", num_layers=1, embedding_width=256, encoder_width=512, hidden_width=512,
        attention="additive", dropout=0.5,
    ),
}  # fmt: skip
"""Sequence to sequence as the tutorials on Multi30k know it, without and with attention."""


def flops(
    shape: RecurrentShape, parameters: Mapping[str, Size], source_tokens: int, target_tokens: int
) -> int:
    """Floating-point operations of forward and backward for one pair, counted as the GPT family's.

    6 for each parameter and token that it multiplies: source tokens for the encoder and the keys
    of attention, the pair as one for the bridge between the states, target tokens for the rest;
    tables multiply nothing. Attention takes 6 (H + M) for each source token at each target token.

    Args:
        shape: Of the network.
        parameters: Size of each, as `RecurrentNetwork.named_parameters` calls it.
        source_tokens: S.
        target_tokens: T.
    """
    total = 0
    for name, size in parameters.items():
        if name.endswith(("embedding", "attention_score")):
            continue
        if "bridge" in name:
            num_tokens = 1
        else:
            is_of_source = name.startswith("encoder.") or "attention_key" in name
            num_tokens = source_tokens if is_of_source else target_tokens
        total += 6 * size.numel() * num_tokens
    if shape.attention == "additive":
        total += 6 * source_tokens * target_tokens * (shape.hidden_width + shape.memory_width)
    return total
