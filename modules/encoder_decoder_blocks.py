"""Blocks of the encoder-decoder transformer, and what its decoder keeps between tokens.

Legend: B batch, S source tokens, T target tokens, D width, H heads, W head width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from modules.encoder_decoder_presets import EncoderDecoderShape
from modules.layers import MLP, KeyValueCache, attention
from modules.norms import LayerNorm, RMSNorm
from modules.positions import apply_rotary

Rotary = tuple[Tensor, Tensor]


@dataclass
class EncoderDecoderCache(KeyValueCache):
    """Keys and values of the target so far, and of the encoded source, for all decoder blocks.

    Attributes:
        memory: Of each block, keys and values of the source [B, H, S, W]; empty until encoded.
        memory_mask: bool [B, 1, 1, S], true at source tokens.
        sources: int64 [B], which of the sources first encoded each row belongs to.
    """

    memory: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    memory_mask: Tensor | None = None
    sources: Tensor | None = None

    def select(self, rows: Tensor) -> None:
        """Keep the rows int64 [B'] in this order, repeated ones too.

        Beams that stay with their sources leave the memory as it is, the larger part.
        """
        self.keys, self.values = (self._reorder(t, rows) for t in (self.keys, self.values))
        assert self.sources is not None
        assert self.memory_mask is not None
        sources = self.sources[rows]
        if not torch.equal(sources, self.sources):
            self.memory = [(keys[rows], values[rows]) for keys, values in self.memory]
            self.memory_mask, self.sources = self.memory_mask[rows], sources

    def _reorder(self, x: Tensor, rows: Tensor) -> Tensor:
        """Take rows of the filled part of `x` [L, B, H, capacity, W]."""
        result = x.new_empty(x.size(0), rows.size(0), *x.shape[2:])
        result[:, :, :, : self.length] = x[:, rows, :, : self.length]
        return result


class Attention(nn.Module):
    """Projections of multi-head attention.

    Scores are scaled by 1 / sqrt(W), which T5's are not: to have the same scores, weights of
    `query` copied from a T5 are multiplied by sqrt(W).

    Args:
        shape: Of the network.
        layer: Index of the block, which finds its part of a cache.
    """

    def __init__(self, shape: EncoderDecoderShape, layer: int):
        super().__init__()
        self.shape, self.layer = shape, layer
        inner = shape.num_heads * shape.head_width
        self.query = nn.Linear(shape.width, inner, bias=shape.bias)
        self.key = nn.Linear(shape.width, inner, bias=shape.bias)
        self.value = nn.Linear(shape.width, inner, bias=shape.bias)
        self.output = nn.Linear(inner, shape.width, bias=shape.bias)

    def heads(self, x: Tensor) -> Tensor:
        """Cut `x` [B, T, H x W] into heads [B, T, H, W]."""
        return x.unflatten(-1, (self.shape.num_heads, self.shape.head_width))

    def mix(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Attend with `queries` [B, H, T, W] to `keys` and `values` [B, H, S, W]; [B, T, D]."""
        dropout = self.shape.dropout if self.training else 0.0
        mixed = attention(queries, keys, values, mask=mask, dropout=dropout)
        return self.output(mixed.transpose(1, 2).flatten(2))


class SelfAttention(Attention):
    """Attention of a stream to itself; `mask` is as in `layers.attention`."""

    def forward(
        self, x: Tensor, rotary: Rotary | None, mask: Tensor | None, cache: KeyValueCache | None
    ) -> Tensor:
        """Mix `x` [B, T, D] over tokens."""
        queries, keys = self.heads(self.query(x)), self.heads(self.key(x))  # [B, T, H, W]
        if rotary is not None:
            queries, keys = apply_rotary(queries, rotary), apply_rotary(keys, rotary)
        keys, values = keys.transpose(1, 2), self.heads(self.value(x)).transpose(1, 2)
        if cache is not None:
            keys, values = cache.extend(self.layer, keys, values)
        return self.mix(queries.transpose(1, 2), keys, values, mask)


class CrossAttention(Attention):
    """Attention of the target to the encoded source."""

    def forward(
        self, x: Tensor, memory: Tensor | None, mask: Tensor, cache: EncoderDecoderCache | None
    ) -> Tensor:
        """Mix tokens of `memory` [B, S, D] into `x` [B, T, D]; without it, of the cache."""
        queries = self.heads(self.query(x)).transpose(1, 2)  # [B, H, T, W]
        if memory is None:
            assert cache is not None
            keys, values = cache.memory[self.layer]
        else:
            keys, values = (
                self.heads(part(memory)).transpose(1, 2) for part in (self.key, self.value)
            )
            if cache is not None:
                cache.memory.append((keys, values))
        return self.mix(queries, keys, values, mask)


class Block(nn.Module):
    """What blocks of both stacks have: self-attention, a feed-forward part, and their norms."""

    def __init__(self, shape: EncoderDecoderShape, layer: int):
        super().__init__()
        self.is_pre_norm = shape.norm_position == "pre"
        self.attention_norm = make_norm(shape)
        self.attention = SelfAttention(shape, layer)
        self.mlp_norm = make_norm(shape)
        self.mlp = MLP(shape.width, shape.mlp_width, activation=shape.activation, bias=shape.bias)
        self.dropout = nn.Dropout(shape.dropout)

    def add(self, x: Tensor, norm: nn.Module, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """Add a branch to the residual stream, with its norm before or after."""
        if self.is_pre_norm:
            return x + self.dropout(branch(norm(x)))
        return norm(x + self.dropout(branch(x)))


class EncoderBlock(Block):
    """One layer of the encoder: attention among source tokens, then feed-forward."""

    def forward(self, x: Tensor, rotary: Rotary | None, mask: Tensor) -> Tensor:
        """Transform the residual stream `x` [B, S, D]."""
        x = self.add(x, self.attention_norm, lambda y: self.attention(y, rotary, mask, None))
        return self.add(x, self.mlp_norm, self.mlp)


class DecoderBlock(Block):
    """One layer of the decoder: attention to the target so far, to the source, feed-forward."""

    def __init__(self, shape: EncoderDecoderShape, layer: int):
        super().__init__(shape, layer)
        self.cross_attention_norm = make_norm(shape)
        self.cross_attention = CrossAttention(shape, layer)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None,
        mask: Tensor | None,
        memory: Tensor | None,
        memory_mask: Tensor,
        cache: EncoderDecoderCache | None,
    ) -> Tensor:
        """Transform the residual stream `x` [B, T, D]."""
        x = self.add(x, self.attention_norm, lambda y: self.attention(y, rotary, mask, cache))
        x = self.add(
            x,
            self.cross_attention_norm,
            lambda y: self.cross_attention(y, memory, memory_mask, cache),
        )
        return self.add(x, self.mlp_norm, self.mlp)


def make_norm(shape: EncoderDecoderShape) -> nn.Module:
    """Make a norm of the shape's kind."""
    if shape.norm == "rmsnorm":
        return RMSNorm(shape.width, gain=True, epsilon=shape.norm_epsilon)
    return LayerNorm(shape.width, eps=shape.norm_epsilon, bias=shape.bias)
