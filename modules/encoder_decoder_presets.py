"""What transformers of the encoder-decoder family look like, by name, and what they cost.

Legend: S source tokens, T target tokens, D width, H heads, W head width.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Size

from modules.presets import refuse_unknown


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderShape:
    """What an encoder and its decoder look like, apart from vocabularies and lengths.

    Attributes:
        encoder_layers: Number of encoder blocks.
        decoder_layers: Number of decoder blocks.
        num_heads: H, attention heads.
        head_width: W, size of one head; H x W may differ from `width`.
        width: D, size of the residual stream.
        mlp_width: Size of the hidden layer of the feed-forward part.
        norm: `layernorm`, or `rmsnorm` with a gain (arXiv 1910.07467).
        norm_position: `pre`: each branch takes the normalised stream, and both stacks end in a
            norm; `post`: the stream itself is normalised after each branch is added (Vaswani et
            al. 2017, arXiv 1706.03762).
        norm_epsilon: Added to the variance or mean square.
        positions: `relative_bias` (of distances, on the scores of self-attention; Raffel et al.
            2020, arXiv 1910.10683), `rope` (arXiv 2104.09864), or a vector a position added to
            the embedding: `learned` (one table a side), or `sinusoidal` (arXiv 1706.03762).
        relative_buckets: Number of biases a head, of `relative_bias`; a multiple of 4.
        relative_distance: From here on all distances share one bias.
        activation: `relu`, `gelu` (tanh form), or gated `geglu` or `swiglu` (arXiv 2002.05202).
        bias: Whether linear layers, layer norms and a head of its own have biases.
        share_embeddings: Whether both sides look up one table; then they have one vocabulary.
        tie_head: Whether the head is the transposed target embedding.
        scale_embeddings: Whether what is looked up is multiplied by sqrt(D), before positions
            are added (arXiv 1706.03762, section 3.4).
        dropout: Probability, on embeddings, attention weights and residual branches.
        initialisation: Scheme of `initial_value`: `t5`, `fan_in` or `xavier`.
    """

    encoder_layers: int
    decoder_layers: int
    num_heads: int
    head_width: int
    width: int
    mlp_width: int
    norm: Literal["layernorm", "rmsnorm"]
    norm_position: Literal["pre", "post"]
    norm_epsilon: float
    positions: Literal["relative_bias", "rope", "learned", "sinusoidal"]
    relative_buckets: int
    relative_distance: int
    activation: Literal["relu", "gelu", "geglu", "swiglu"]
    bias: bool
    share_embeddings: bool
    tie_head: bool
    scale_embeddings: bool
    dropout: float
    initialisation: Literal["t5", "fan_in", "xavier"]

    def __post_init__(self):
        refuse_unknown(self, _CHOICES)
        if self.positions == "rope" and self.head_width % 2:
            raise ValueError(
                f"module.network.head_width={self.head_width} -> positions=rope rotates pairs -> "
                "choose an even head width or other positions"
            )
        if self.positions == "sinusoidal" and self.width % 2:
            raise ValueError(
                f"module.network.width={self.width} -> positions=sinusoidal pairs sines with "
                "cosines -> choose an even width or other positions"
            )
        if self.positions == "relative_bias":
            self._check_buckets()

    def _check_buckets(self) -> None:
        if self.relative_buckets < 4 or self.relative_buckets % 4:
            raise ValueError(
                f"module.network.relative_buckets={self.relative_buckets} -> cannot be halved by "
                "direction and again into near and far -> choose a multiple of 4"
            )
        if self.relative_distance <= self.relative_buckets // 2:
            raise ValueError(
                f"module.network.relative_distance={self.relative_distance} -> half of "
                f"relative_buckets={self.relative_buckets} are single distances, and the rest "
                f"would be none -> choose more than {self.relative_buckets // 2}"
            )


_CHOICES = {
    "norm": ("layernorm", "rmsnorm"),
    "norm_position": ("pre", "post"),
    "positions": ("relative_bias", "rope", "learned", "sinusoidal"),
    "activation": ("relu", "gelu", "geglu", "swiglu"),
    "initialisation": ("t5", "fan_in", "xavier"),
}

# Raffel et al. 2020, arXiv 1910.10683, as revised in T5 v1.1 (the authors' repository).
_T5: dict[str, Any] = dict(
    norm="rmsnorm", norm_position="pre", norm_epsilon=1e-6, positions="relative_bias",
    relative_buckets=32, relative_distance=128, activation="geglu", bias=False,
    share_embeddings=True, tie_head=False, scale_embeddings=False, dropout=0.0,
    initialisation="t5",
)  # fmt: skip
# As the GPT family's modern form, where it applies.
_MODERN: dict[str, Any] = _T5 | dict(
    norm_epsilon=1e-5, positions="rope", activation="swiglu", initialisation="fan_in"
)

PRESETS: dict[str, EncoderDecoderShape] = {
    "tiny": EncoderDecoderShape(
        encoder_layers=2, decoder_layers=2, num_heads=4, head_width=32, width=128, mlp_width=384,
        **_MODERN,
    ),
    "small": EncoderDecoderShape(
        encoder_layers=8, decoder_layers=8, num_heads=6, head_width=64, width=512, mlp_width=1024,
        **_T5,
    ),
    "base": EncoderDecoderShape(
        encoder_layers=12, decoder_layers=12, num_heads=12, head_width=64, width=768,
        mlp_width=2048, **_MODERN,
    ),
    "t5_v1_1_base": EncoderDecoderShape(
        encoder_layers=12, decoder_layers=12, num_heads=12, head_width=64, width=768,
        mlp_width=2048, **_T5,
    ),
    # "Attention is all you need" at the size of bentrevett's PyTorch tutorial for Multi30k.
    "vaswani_small": EncoderDecoderShape(
        encoder_layers=3, decoder_layers=3, num_heads=8, head_width=32, width=256, mlp_width=512,
        norm="layernorm", norm_position="post", norm_epsilon=1e-5, positions="learned",
        relative_buckets=32, relative_distance=128, activation="relu", bias=True,
        share_embeddings=False, tie_head=False, scale_embeddings=True, dropout=0.1,
        initialisation="xavier",
    ),
}  # fmt: skip
"""`tiny` and `base` are of the modern form, `small` and `t5_v1_1_base` of T5 v1.1's."""


def flops(
    shape: EncoderDecoderShape,
    parameters: Mapping[str, Size],
    source_tokens: int,
    target_tokens: int,
) -> int:
    """Floating-point operations of forward and backward for one pair, counted as the GPT family's.

    6 for each parameter and token that it multiplies: source tokens for the encoder and for keys
    and values of cross-attention, target tokens for the rest; tables that are only looked up
    multiply nothing. Attention's two products take 12 H W times queries times keys in each
    block: S x S, T x S, and half of T x T.

    Args:
        shape: Of the network.
        parameters: Size of each, as `TransformerNetwork.named_parameters` calls it.
        source_tokens: S.
        target_tokens: T.
    """
    num_source = num_target = 0
    for name, size in parameters.items():
        is_head = name == "embedding.weight" and shape.tie_head
        if name.endswith(("embedding.weight", "relative_bias.weight")) and not is_head:
            continue
        if re.match(r"encoder|.*\.cross_attention\.(key|value)", name):
            num_source += size.numel()
        else:
            num_target += size.numel()
    scores = shape.encoder_layers * source_tokens**2
    scores += shape.decoder_layers * target_tokens * source_tokens
    attention = 12 * scores + 6 * shape.decoder_layers * target_tokens**2
    inner = shape.num_heads * shape.head_width
    return 6 * (num_source * source_tokens + num_target * target_tokens) + attention * inner
