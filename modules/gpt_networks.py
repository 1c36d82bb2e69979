"""The decoder network of the GPT family and its initial values.

Legend: B batch, T tokens, D width, H heads, K key-value heads, W head width, V vocabulary,
L layers.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.gpt_presets import GPTShape
from modules.initial_values import generator_for
from modules.layers import (
    MLP,
    KeyValueCache,
    Reduction,
    attention,
    document_mask,
    linear_cross_entropy,
    soft_cap,
    table_of,
)
from modules.norms import NORM_EPSILON, LayerNorm, RMSNorm, rms_norm
from modules.positions import apply_rotary, document_positions, rotary_tables


class Attention(nn.Module):
    """Causal self-attention over the residual stream.

    Args:
        shape: Of the network.
        layer: Index of the block, which finds its part of a cache.
    """

    def __init__(self, shape: GPTShape, layer: int):
        super().__init__()
        self.shape, self.layer = shape, layer
        kv_width = shape.num_kv_heads * shape.head_width
        self.query = nn.Linear(shape.width, shape.width, bias=shape.bias)
        self.key = nn.Linear(shape.width, kv_width, bias=shape.bias)
        self.value = nn.Linear(shape.width, kv_width, bias=shape.bias)
        self.output = nn.Linear(shape.width, shape.width, bias=shape.bias)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        cache: KeyValueCache | None,
    ) -> Tensor:
        """Mix `x` [B, T, D] over tokens."""
        heads = (*x.shape[:2], -1, self.shape.head_width)
        queries = self.query(x).view(heads)  # [B, T, H, W]
        keys, values = self.key(x).view(heads), self.value(x).view(heads)  # [B, T, K, W]
        # Rotation and norm come before the transposition: on a CPU contiguous heads are faster.
        if rotary is not None:
            queries, keys = apply_rotary(queries, rotary), apply_rotary(keys, rotary)
        if self.shape.qk_norm:
            queries, keys = rms_norm(queries), rms_norm(keys)
        queries, keys, values = (t.transpose(1, 2) for t in (queries, keys, values))
        if cache is not None:
            keys, values = cache.extend(self.layer, keys, values)
        dropout = self.shape.dropout if self.training else 0.0
        mixed = attention(queries, keys, values, mask=mask, dropout=dropout)
        return self.output(mixed.transpose(1, 2).flatten(2))  # [B, T, D]


class Block(nn.Module):
    """One layer: attention, then feed-forward, each normalised before and added back (pre-norm)."""

    def __init__(self, shape: GPTShape, layer: int):
        super().__init__()
        self.attention_norm = _norm(shape)
        self.attention = Attention(shape, layer)
        self.mlp_norm = _norm(shape)
        self.mlp = MLP(shape.width, shape.mlp_width, activation=shape.activation, bias=shape.bias)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        cache: KeyValueCache | None,
    ) -> Tensor:
        """Transform the residual stream `x` [B, T, D]."""
        x = x + self.dropout(self.attention(self.attention_norm(x), rotary, mask, cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class GPTNetwork(nn.Module):
    """A decoder-only transformer; plain torch, no parameters outside it, no buffers.

    Args:
        shape: Architecture and sizes.
        vocab_size: V.
        sequence_length: Longest row, in tokens; the number of learned positions.
    """

    def __init__(self, shape: GPTShape, *, vocab_size: int, sequence_length: int):
        super().__init__()
        self.shape, self.sequence_length = shape, sequence_length
        self.embedding = nn.Embedding(vocab_size, shape.width)
        if shape.positions == "learned":
            self.position_embedding = nn.Embedding(sequence_length, shape.width)
        self.dropout = nn.Dropout(shape.dropout)
        self.blocks = nn.ModuleList(Block(shape, layer) for layer in range(shape.num_layers))
        self.norm = _norm(shape)
        if not shape.tie_embeddings:
            self.head = nn.Linear(shape.width, vocab_size, bias=False)

    def forward(
        self,
        inputs: Tensor,
        targets: Tensor | None = None,
        *,
        documents: Tensor | None = None,
        cache: KeyValueCache | None = None,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """Compute the loss where there are targets, else logits.

        One entry for both, so that wrappers that gather sharded weights around a call see it.

        Args:
            inputs: int64 [B, T].
            targets: int64 [B, T], `IGNORED` where nothing is predicted.
            documents: int32 [B, T], document number within the row. Given, tokens attend within
                their document only and positions start again with each.
            cache: Keys and values of the tokens before `inputs`, extended in place; then T is 1
                or the cache is empty, and logits are of the last token only.
            reduction: Of the loss, over targets that are not ignored.

        Returns:
            fp32 scalar loss in nats, or fp32 logits [B, T, V] ([B, 1, V] with a cache).
        """
        table = table_of(self.embedding)  # [V, D]
        # Tied weights are one parameter with one name: a state dict holds them once.
        head = table if self.shape.tie_embeddings else self.head.weight  # [V, D]
        hidden = self._hidden(F.embedding(inputs, table), documents, cache)
        softcap = self.shape.logit_softcap or None
        if targets is not None:
            return linear_cross_entropy(hidden, head, targets, softcap=softcap, reduction=reduction)
        if cache is not None:
            hidden = hidden[:, -1:]
        return soft_cap(F.linear(hidden, head).float(), softcap)

    def _hidden(self, x: Tensor, documents: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        """Return the last block's normalised output [B, T, D] for embedded tokens `x`."""
        mask = None
        if documents is None:
            start = 0 if cache is None else cache.length
            positions = torch.arange(start, start + x.size(1), device=x.device)  # [T]
        else:
            mask, positions = document_mask(documents), document_positions(documents)  # [B, T]
        rotary = None
        if self.shape.positions == "learned":
            x = x + F.embedding(positions, table_of(self.position_embedding))
        else:
            rotary = rotary_tables(positions, self.shape.head_width, self.shape.rope_base)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, rotary, mask, cache)
        if cache is not None:
            cache.length += x.size(1)
        return self.norm(x)

    def new_cache(self, batch: int, device: torch.device) -> KeyValueCache:
        """Make an empty cache for `batch` sequences of up to `sequence_length` tokens."""
        shape = self.shape
        size = (shape.num_layers, batch, shape.num_kv_heads, self.sequence_length, shape.head_width)
        return KeyValueCache.empty(size, like=self.embedding.weight, device=device)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Set every parameter to its initial value."""
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_value(self.shape, name, parameter.shape, seed))


def initial_value(shape: GPTShape, name: str, size: torch.Size, seed: int) -> Tensor:
    """Draw the initial value of one parameter, a function of the seed and its name alone.

    So any subset of parameters, on any rank and in any order, starts at the same values. Biases
    start at 0 and gains of norms at 1. The rest:

    * `gpt2` (Radford et al. 2019, section 2.3): normal, deviation 0.02; the output projections of
      both residual branches 0.02 / sqrt(2 L).
    * `fan_in` (as nanochat and modded-nanogpt): matrices uniform with deviation 1 / sqrt(fan in),
      both output projections 0, so that every block starts as the identity; token embedding
      normal with deviation 1, or 0.02 where it is the head as well; positions 0.02; head 0.001.

    Args:
        shape: Of the network.
        name: Of the parameter, as `GPTNetwork.named_parameters` has it.
        size: Its shape.
        seed: Of the run.

    Returns:
        fp32 tensor of that size on the CPU.
    """
    if name.endswith(".bias"):
        return torch.zeros(size, device="cpu")
    if "norm." in name:
        return torch.ones(size, device="cpu")
    generator = generator_for(name, seed)
    value = torch.empty(size, device="cpu")
    is_output = name.endswith("output.weight")
    if shape.initialisation == "gpt2":
        deviation = 0.02 / math.sqrt(2 * shape.num_layers) if is_output else 0.02
        return value.normal_(0.0, deviation, generator=generator)
    if is_output:
        return value.zero_()
    if name == "embedding.weight":
        return value.normal_(0.0, 0.02 if shape.tie_embeddings else 1.0, generator=generator)
    if name == "position_embedding.weight":
        return value.normal_(0.0, 0.02, generator=generator)
    if name == "head.weight":
        return value.normal_(0.0, 0.001, generator=generator)
    bound = math.sqrt(3 / size[1])
    return value.uniform_(-bound, bound, generator=generator)


def _norm(shape: GPTShape) -> nn.Module:
    if shape.norm == "rmsnorm":
        return RMSNorm(shape.width, gain=shape.norm_gain)
    return LayerNorm(
        shape.width, eps=NORM_EPSILON, elementwise_affine=shape.norm_gain, bias=shape.bias
    )
