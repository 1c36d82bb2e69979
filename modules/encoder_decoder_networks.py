"""The transformer of the encoder-decoder family and its initial values.

Legend: B batch, S source tokens, T target tokens, D width, H heads, W head width, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.encoder_decoder_blocks import (
    DecoderBlock,
    EncoderBlock,
    EncoderDecoderCache,
    make_norm,
)
from modules.encoder_decoder_presets import EncoderDecoderShape
from modules.initial_values import generator_for
from modules.layers import linear_cross_entropy, table_of
from modules.positions import relative_buckets, rotary_tables, sinusoids

ROPE_BASE = 10000.0
"""Base of the rotary wavelengths, as in the paper; for sources of some thousand tokens."""


class TransformerNetwork(nn.Module):
    """An encoder and a decoder that attends to it; plain torch, no buffers.

    Args:
        shape: Architecture and sizes.
        source_vocab: V of the source.
        target_vocab: V of the target.
        source_length: Longest source in tokens; the number of its learned positions.
        target_length: Longest target in tokens; likewise, and the capacity of a cache.

    Raises:
        ValueError: One table is to serve two vocabularies.
    """

    def __init__(
        self,
        shape: EncoderDecoderShape,
        *,
        source_vocab: int,
        target_vocab: int,
        source_length: int,
        target_length: int,
    ):
        super().__init__()
        if shape.share_embeddings and source_vocab != target_vocab:
            raise ValueError(
                f"module.network.share_embeddings=true -> the source has {source_vocab:,} tokens "
                f"and the target {target_vocab:,} -> choose false, or prepare one vocabulary"
            )
        self.shape, self.target_length = shape, target_length
        self.embedding = nn.Embedding(target_vocab, shape.width)
        if not shape.share_embeddings:
            self.source_embedding = nn.Embedding(source_vocab, shape.width)
        if shape.positions == "learned":
            self.position_embedding = nn.Embedding(target_length, shape.width)
            self.source_position_embedding = nn.Embedding(source_length, shape.width)
        if shape.positions == "relative_bias":
            self.encoder_relative_bias = nn.Embedding(shape.relative_buckets, shape.num_heads)
            self.decoder_relative_bias = nn.Embedding(shape.relative_buckets, shape.num_heads)
        self.dropout = nn.Dropout(shape.dropout)
        self.encoder_blocks = nn.ModuleList(
            EncoderBlock(shape, layer) for layer in range(shape.encoder_layers)
        )
        self.decoder_blocks = nn.ModuleList(
            DecoderBlock(shape, layer) for layer in range(shape.decoder_layers)
        )
        if shape.norm_position == "pre":
            self.encoder_norm = make_norm(shape)
            self.decoder_norm = make_norm(shape)
        if not shape.tie_head:
            self.head = nn.Linear(shape.width, target_vocab, bias=shape.bias)

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers of both stacks, each a unit to checkpoint, shard or compile."""
        return [*self.encoder_blocks, *self.decoder_blocks]

    def forward(
        self,
        source: Tensor | None,
        source_mask: Tensor | None,
        inputs: Tensor,
        targets: Tensor | None = None,
        *,
        cache: EncoderDecoderCache | None = None,
        label_smoothing: float = 0.0,
        teacher: Tensor | None = None,
    ) -> Tensor:
        """Compute the summed loss where there are targets, else logits.

        One entry for both, so that wrappers that gather sharded weights around a call see it.

        Args:
            source: int64 [B, S]; None where the cache has it encoded.
            source_mask: bool [B, S], false at padding; None likewise.
            inputs: int64 [B, T], from the start token on.
            targets: int64 [B, T], `IGNORED` where nothing is predicted.
            cache: Of the tokens before `inputs`, extended in place. Its first call encodes the
                source into it; afterwards T is 1. Logits are of the last token only.
            label_smoothing: As `linear_cross_entropy`.
            teacher: None; a transformer is fed all of `inputs`.

        Returns:
            fp32 scalar, nats summed over targets that are not ignored, or fp32 logits [B, T, V]
            ([B, 1, V] with a cache).
        """
        assert teacher is None
        table = table_of(self.embedding)  # [V, D]
        memory = None
        if source is None:
            assert cache is not None
            memory_mask = cache.memory_mask
        else:
            assert source_mask is not None
            memory_mask = _visible(source_mask)
            memory = self._encode(source, memory_mask, table)
            if cache is not None:
                cache.memory_mask = memory_mask
                cache.sources = torch.arange(source.size(0), device=source.device)
        assert memory_mask is not None
        hidden = self._decode(inputs, table, memory, memory_mask, cache)
        # Tied weights are one parameter with one name: a state dict holds them once.
        head, bias = (table, None) if self.shape.tie_head else (self.head.weight, self.head.bias)
        if targets is None:
            hidden = hidden if cache is None else hidden[:, -1:]
            return F.linear(hidden, head, bias).float()
        return linear_cross_entropy(
            hidden,
            head,
            targets,
            bias=bias,
            softcap=None,
            reduction="sum",
            label_smoothing=label_smoothing,
        )

    def _encode(self, source: Tensor, mask: Tensor, table: Tensor) -> Tensor:
        """Return the encoded source [B, S, D]; `mask` is bool [B, 1, 1, S]."""
        shape = self.shape
        positions = torch.arange(source.size(1), device=source.device)  # [S]
        table = table if shape.share_embeddings else table_of(self.source_embedding)
        places = table_of(self.source_position_embedding) if shape.positions == "learned" else None
        x = self._embed(source, positions, table, places)
        if shape.positions == "relative_bias":
            bias = self._relative_bias(self.encoder_relative_bias, positions, positions, True)
            mask = torch.where(mask, bias, -torch.inf)  # [B, H, S, S]
        rotary = self._rotary(positions)
        for block in self.encoder_blocks:
            x = block(x, rotary, mask)
        return self.encoder_norm(x) if shape.norm_position == "pre" else x

    def _decode(
        self,
        inputs: Tensor,
        table: Tensor,
        memory: Tensor | None,
        memory_mask: Tensor,
        cache: EncoderDecoderCache | None,
    ) -> Tensor:
        """Return the last block's output [B, T, D] for target tokens [B, T], normalised."""
        shape, start = self.shape, 0 if cache is None else cache.length
        keys = torch.arange(start + inputs.size(1), device=inputs.device)
        positions = keys[start:]  # [T]
        places = table_of(self.position_embedding) if shape.positions == "learned" else None
        x = self._embed(inputs, positions, table, places)
        mask = None
        if shape.positions == "relative_bias":
            bias = self._relative_bias(self.decoder_relative_bias, positions, keys, False)
            mask = torch.where(positions[:, None] >= keys, bias, -torch.inf)  # [1, H, T, start + T]
        rotary = self._rotary(positions)
        for block in self.decoder_blocks:
            x = block(x, rotary, mask, memory, memory_mask, cache)
        if cache is not None:
            cache.length += inputs.size(1)
        return self.decoder_norm(x) if shape.norm_position == "pre" else x

    def _embed(
        self, tokens: Tensor, positions: Tensor, table: Tensor, places: Tensor | None
    ) -> Tensor:
        x = F.embedding(tokens, table)
        if self.shape.scale_embeddings:
            x = x * math.sqrt(self.shape.width)
        if places is not None:
            x = x + F.embedding(positions, places)
        elif self.shape.positions == "sinusoidal":
            x = x + sinusoids(positions, self.shape.width)
        return self.dropout(x)

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.shape.positions != "rope":
            return None
        return rotary_tables(positions, self.shape.head_width, ROPE_BASE)

    def _relative_bias(
        self, embedding: nn.Embedding, queries: Tensor, keys: Tensor, bidirectional: bool
    ) -> Tensor:
        """Look up the biases [1, H, T, S] of positions [T] and [S], for all blocks of a stack."""
        buckets = relative_buckets(
            queries,
            keys,
            num_buckets=self.shape.relative_buckets,
            max_distance=self.shape.relative_distance,
            bidirectional=bidirectional,
        )
        return F.embedding(buckets, table_of(embedding)).permute(2, 0, 1).unsqueeze(0)

    def new_cache(self, batch: int, device: torch.device) -> EncoderDecoderCache:
        """Make an empty cache for `batch` targets of up to `target_length` tokens."""
        shape = self.shape
        size = (shape.decoder_layers, batch, shape.num_heads, self.target_length, shape.head_width)
        return EncoderDecoderCache.empty(size, like=self.embedding.weight, device=device)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Set every parameter to its initial value."""
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_value(self.shape, name, parameter.shape, seed))


def _visible(source_mask: Tensor) -> Tensor:
    """Turn a mask [B, S] into one of keys [B, 1, 1, S] in which each row has a token to look at.

    A row that only pads shows its first token, so that no softmax is over nothing.
    """
    is_empty = ~source_mask.any(dim=1, keepdim=True)
    first = torch.cat([source_mask[:, :1] | is_empty, source_mask[:, 1:]], dim=1)
    return first[:, None, None, :]


def initial_value(shape: EncoderDecoderShape, name: str, size: torch.Size, seed: int) -> Tensor:
    """Draw the initial value of one parameter, a function of the seed and its name alone.

    Biases start at 0 and gains of norms at 1. The rest:

    * `t5` (Raffel et al. 2020, the authors' code): matrices, the head and biases of distances
      normal with deviation 1 / sqrt(fan in), for biases 1 / sqrt(D); token embeddings and learned
      positions 1, or 1 / sqrt(D) for the table that is the head as well.
    * `fan_in` (as nanochat): matrices uniform with deviation 1 / sqrt(fan in), output projections
      0; token embeddings normal with deviation 1, or 0.02 for the table that is the head as well;
      learned positions and biases of distances 0.02; head 0.001.
    * `xavier` (Glorot and Bengio 2010): all uniform within sqrt(6 / (rows + columns)).

    Args:
        shape: Of the network.
        name: Of the parameter, as `TransformerNetwork.named_parameters` has it.
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
    if shape.initialisation == "xavier":
        bound = math.sqrt(6 / (size[0] + size[1]))
        return value.uniform_(-bound, bound, generator=generator)
    is_t5 = shape.initialisation == "t5"
    narrow = 1 / math.sqrt(shape.width)
    if name.endswith("embedding.weight"):
        is_head = name == "embedding.weight" and shape.tie_head
        is_small = is_head or (not is_t5 and "position" in name)
        deviation = 1.0 if not is_small else narrow if is_t5 else 0.02
    elif name.endswith("relative_bias.weight"):
        deviation = narrow if is_t5 else 0.02
    elif name == "head.weight":
        deviation = narrow if is_t5 else 0.001
    elif is_t5:
        deviation = 1 / math.sqrt(size[1])
    elif name.endswith("output.weight"):
        return value.zero_()
    else:
        bound = math.sqrt(3 / size[1])
        return value.uniform_(-bound, bound, generator=generator)
    return value.normal_(0.0, deviation, generator=generator)


def role_of(shape: EncoderDecoderShape, name: str, num_dims: int) -> str:
    """What the parameter `name` is to an optimizer: `matrix`, `embedding`, `head` or `other`.

    Matrices of the blocks are `matrix`. A table that is the head as well is `head`, since its rate
    must then suit the logits. Gains, biases, positions and biases of distances are `other`.
    """
    if "_blocks." in name and num_dims == 2:
        return "matrix"
    if name == "head.weight" or (name == "embedding.weight" and shape.tie_head):
        return "head"
    return "embedding" if name in ("embedding.weight", "source_embedding.weight") else "other"
