"""What decoders of the GPT family look like: shapes, named presets, and overrides of them.

Legend: D width, H heads, K key-value heads, W head width, L layers.
"""

from dataclasses import dataclass
from typing import Any, Literal

from modules.presets import choose, refuse_unknown


@dataclass(frozen=True, kw_only=True)
class GPTShape:
    """What a decoder looks like, apart from its vocabulary and its context.

    Attributes:
        num_layers: L, number of blocks.
        num_heads: H, attention heads; divides `width`.
        num_kv_heads: K, heads of keys and values; divides `num_heads`. Equal to it: plain
            multi-head attention; fewer: grouped queries (arXiv 2305.13245).
        width: D, size of the residual stream.
        mlp_ratio: Width of the feed-forward layer over `width`.
        norm: `layernorm`, or `rmsnorm` (arXiv 1910.07467).
        norm_gain: Whether norms have a learned gain.
        positions: `learned` (one vector a position, as GPT-2), or `rope` (arXiv 2104.09864).
        rope_base: Base of the rotary wavelengths.
        activation: `gelu` (tanh form, as GPT-2), `swiglu` (arXiv 2002.05202), or `relu2`
            (arXiv 2109.08668).
        qk_norm: Whether queries and keys are RMS-normalised per head, without gain, after the
            rotation (arXiv 2302.05442).
        logit_softcap: Bound on the logits by a tanh (arXiv 2408.00118); 0 for none.
        bias: Whether linear layers and layer norms have biases.
        tie_embeddings: Whether the head is the transposed token embedding.
        dropout: Probability, on the embedding, attention weights and both residual branches.
        initialisation: Scheme of `GPTNetwork.initial_value`, `gpt2` or `fan_in`.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    width: int
    mlp_ratio: float
    norm: Literal["layernorm", "rmsnorm"]
    norm_gain: bool
    positions: Literal["learned", "rope"]
    rope_base: float
    activation: Literal["gelu", "swiglu", "relu2"]
    qk_norm: bool
    logit_softcap: float
    bias: bool
    tie_embeddings: bool
    dropout: float
    initialisation: Literal["gpt2", "fan_in"]

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(
                f"module.network.width={self.width} -> cannot be cut into "
                f"num_heads={self.num_heads} equal heads -> choose a multiple of the heads"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"module.network.num_kv_heads={self.num_kv_heads} -> cannot serve "
                f"num_heads={self.num_heads} in equal groups -> choose a divisor of the heads"
            )
        if self.positions == "rope" and self.head_width % 2:
            raise ValueError(
                f"module.network.positions=rope -> it rotates pairs, and width/num_heads="
                f"{self.head_width} is odd -> choose an even head width or positions=learned"
            )
        refuse_unknown(self, _CHOICES)

    @property
    def head_width(self) -> int:
        """W, size of one head."""
        return self.width // self.num_heads

    @property
    def mlp_width(self) -> int:
        """Size of the hidden layer of the feed-forward part."""
        return round(self.mlp_ratio * self.width)


_CHOICES = {
    "norm": ("layernorm", "rmsnorm"),
    "positions": ("learned", "rope"),
    "activation": ("gelu", "swiglu", "relu2"),
    "initialisation": ("gpt2", "fan_in"),
}

_FORMS: dict[str, dict[str, Any]] = {
    # Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
    "gpt2": dict(
        mlp_ratio=4.0, norm="layernorm", norm_gain=True, positions="learned", rope_base=10000.0,
        activation="gelu", qk_norm=False, logit_softcap=0.0, bias=True, tie_embeddings=True,
        dropout=0.0, initialisation="gpt2",
    ),
    # Touvron et al. 2023, arXiv 2307.09288; 2.6875 gives the 11,008 of its 7B form.
    "llama": dict(
        mlp_ratio=2.6875, norm="rmsnorm", norm_gain=True, positions="rope", rope_base=10000.0,
        activation="swiglu", qk_norm=False, logit_softcap=0.0, bias=False, tie_embeddings=False,
        dropout=0.0, initialisation="gpt2",
    ),
    # The choices that modded-nanogpt and nanochat share: no parameters but matrices.
    "modern": dict(
        mlp_ratio=4.0, norm="rmsnorm", norm_gain=False, positions="rope", rope_base=10000.0,
        activation="relu2", qk_norm=True, logit_softcap=15.0, bias=False, tie_embeddings=False,
        dropout=0.0, initialisation="fan_in",
    ),
}  # fmt: skip

# name: (num_layers, num_heads, num_kv_heads outside the gpt2 form, width)
_SIZES = {
    "tiny": (4, 4, 4, 128),
    "mini": (6, 6, 6, 384),
    "124m": (12, 12, 12, 768),
    "350m": (24, 16, 8, 1024),
    "1b": (24, 16, 8, 2048),
    "3b": (32, 24, 8, 3072),
    "7b": (32, 32, 8, 4096),
}

PRESETS: dict[str, GPTShape] = {
    f"{form}_{size}": GPTShape(
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads if form == "gpt2" else num_kv_heads,
        width=width,
        **choices,
    )
    for form, choices in _FORMS.items()
    for size, (num_layers, num_heads, num_kv_heads, width) in _SIZES.items()
}
"""Every architecture form (`gpt2`, `llama`, `modern`) at every size (`tiny` to `7b`)."""


def shape_from(preset: str, overrides: dict[str, Any]) -> GPTShape:
    """Look up a preset and replace what `overrides` sets.

    Where only `num_heads` is set, `num_kv_heads` keeps the preset's ratio to it.

    Args:
        preset: A name of `PRESETS`.
        overrides: Fields of `GPTShape`; None means as the preset has it.

    Raises:
        ValueError: The preset or a field is unknown, or the shape is impossible.
    """
    heads = overrides.get("num_heads")
    if isinstance(heads, int) and overrides.get("num_kv_heads") is None:
        base = choose(PRESETS, preset, {})
        group = base.num_heads // base.num_kv_heads
        overrides = {**overrides, "num_kv_heads": max(1, heads // group)}
    return choose(PRESETS, preset, overrides)
