"""Pieces of transformers that several families share, and the loss over large vocabularies.

Legend: B batch, T tokens, S keys, D width, H heads, K key-value heads, W head width,
V vocabulary, N positions of the whole batch (B x T).
"""

from dataclasses import dataclass
from typing import Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.batch import IGNORED

PLAIN_LOGITS_BYTES = 32 * 2**20
"""Up to this size (as fp32) all logits are made at once, the fastest form; above, in chunks."""

Reduction = Literal["mean", "sum"]
Activation = Literal["relu", "relu2", "gelu", "geglu", "swiglu"]


def table_of(embedding: nn.Embedding) -> Tensor:
    """The table of an embedding, [rows, D]; under autocast in fp32.

    There a strategy may keep it in low precision. So what is looked up, the residual stream, is
    fp32 as everywhere, and its gradient is summed in fp32 and rounded once, where bf16 would stop
    adding at 256 occurrences of a token.
    """
    weight = embedding.weight
    return weight.float() if torch.is_autocast_enabled(weight.device.type) else weight


def document_mask(documents: Tensor) -> Tensor:
    """Block-diagonal causal mask: a token attends to earlier ones of its own document.

    Args:
        documents: int32 [B, T], the document's number within the row.

    Returns:
        bool [B, 1, T, T], true where a query (third axis) may look at a key (fourth axis).
    """
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same.tril()


@dataclass
class KeyValueCache:
    """Keys and values of the tokens a decoder has seen, for all its layers.

    Attributes:
        keys: [L, B, K, capacity, W], filled up to `length`.
        values: Like `keys`.
        length: Number of tokens seen; the network advances it once per forward pass.
    """

    keys: Tensor
    values: Tensor
    length: int = 0

    @classmethod
    def empty(cls, size: tuple[int, ...], *, like: Tensor, device: torch.device) -> Self:
        """Make one of a size [L, B, K, capacity, W], in autocast's dtype or that of `like`."""
        is_mixed = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if is_mixed else like.dtype
        keys = torch.empty(size, dtype=dtype, device=device)
        return cls(keys, torch.empty_like(keys))

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store `keys` and `values` [B, K, T, W] of one layer; return all so far [B, K, S, W]."""
        end = self.length + keys.size(2)
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


def attention(
    queries: Tensor, keys: Tensor, values: Tensor, *, mask: Tensor | None, dropout: float
) -> Tensor:
    """Scaled dot-product attention, softmax(Q K^T / sqrt(W) + mask) V.

    Vaswani et al. 2017, arXiv 1706.03762, equation 1; heads of queries share keys and values in
    groups of H / K (Ainslie et al. 2023, arXiv 2305.13245).

    Args:
        queries: [B, H, T, W].
        keys: [B, K, S, W].
        values: Like `keys`.
        mask: Broadcasts to [B, H, T, S]. bool, true where a query may look; or fp32, added to the
            scores, minus infinity where it may not. Every query has a key to look at. None for
            causal attention: S is T, or T is 1 and the query is the last of S tokens.
        dropout: Probability with which an attention weight is dropped.

    Returns:
        [B, H, T, W] in the dtype of `queries`.
    """
    dtype = queries.dtype
    assert mask is not None or queries.size(2) in (1, keys.size(2))
    with torch.autocast(queries.device.type, enabled=False):
        if queries.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
            # On CPU the half-precision kernel is the slower one: forward and backward of
            # [12, 4, 64, 32] took 7.6 ms in bf16 and 1.8 ms in fp32 on one AVX-512 core.
            queries, keys, values = queries.float(), keys.float(), values.float()
        if mask is not None and mask.is_floating_point():
            mask = mask.to(queries.dtype)
        return F.scaled_dot_product_attention(
            queries,
            keys.to(queries.dtype),
            values.to(queries.dtype),
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None and queries.size(2) > 1,
            enable_gqa=keys.size(1) != queries.size(1),
        ).to(dtype)


class MLP(nn.Module):
    """Feed-forward part of a block, gated where the activation is `geglu` or `swiglu`.

    Args:
        width: D, of input and output.
        mlp_width: Of the hidden layer.
        activation: `relu`, `relu2` (squared, arXiv 2109.08668), `gelu` (tanh form), or gated by
            it or by SiLU: `geglu`, `swiglu` (arXiv 2002.05202).
        bias: Whether the layers have biases.
    """

    def __init__(self, width: int, mlp_width: int, *, activation: Activation, bias: bool):
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(width, mlp_width, bias=bias)
        if activation in ("geglu", "swiglu"):
            self.gate = nn.Linear(width, mlp_width, bias=bias)
        self.output = nn.Linear(mlp_width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token of `x` [B, T, D]."""
        if self.activation == "swiglu":
            return self.output(F.silu(self.gate(x)) * self.up(x))
        if self.activation == "geglu":
            return self.output(F.gelu(self.gate(x), approximate="tanh") * self.up(x))
        if self.activation == "gelu":
            return self.output(F.gelu(self.up(x), approximate="tanh"))
        activated = F.relu(self.up(x))
        return self.output(activated.square() if self.activation == "relu2" else activated)


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """Bound logits to (-cap, cap) by cap * tanh(logits / cap); Gemma 2, arXiv 2408.00118, 2.2."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None,
    reduction: Reduction,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy of `softcap(hidden @ weight.T + bias)`, with big logits never held all at once.

    Small logits are made at once. Big ones take torch's chunked `F.linear_cross_entropy` where
    torch has it (2.13) and neither soft cap nor smoothing is asked for, else
    `_ChunkedCrossEntropy`. Both compute the gradients in the forward pass, chunk by chunk, each
    chunk's logits no larger than the larger of `hidden` and `weight`. Under autocast the products
    run in its dtype; softmax and sum are fp32.

    Args:
        hidden: [..., D].
        weight: [V, D].
        targets: int64 [...], `IGNORED` where nothing is predicted.
        bias: [V], or None.
        softcap: Bound of `soft_cap`, or None.
        reduction: `sum` over the predicted targets, or their `mean` (nan where there are none).
        label_smoothing: Share of each target's probability that is spread evenly over the
            vocabulary, itself included (Szegedy et al. 2015, arXiv 1512.00567, section 7).

    Returns:
        fp32 scalar, in nats.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()  # [N, D], [N]
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if bias is not None:
        bias = bias.to(hidden.dtype)
    options: dict[str, Any] = dict(
        ignore_index=IGNORED, reduction=reduction, label_smoothing=label_smoothing
    )
    with torch.autocast(device, enabled=False):
        if 4 * hidden.size(0) * weight.size(0) <= PLAIN_LOGITS_BYTES:
            logits = soft_cap(F.linear(hidden, weight, bias).float(), softcap)
            return F.cross_entropy(logits, targets, **options)
        rows = max(hidden.numel(), weight.numel()) // weight.size(0)
        # On CPU torch's form computes half precision in fp32: 3.5 s against 1.8 s of ours for
        # 2,048 positions, width 384 and 32,768 tokens on one core; in fp32 it leads, 2.5 to 3.8.
        is_slow = device == "cpu" and hidden.dtype != torch.float32
        has_torch_form = hasattr(nn, "LinearCrossEntropyOptions") and not label_smoothing
        if softcap is None and has_torch_form and not is_slow:
            chunks = nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=rows)
            return F.linear_cross_entropy(
                hidden, weight, targets, linear_bias=bias, options=chunks, **options
            ).float()
        total = cast(
            Tensor,
            _ChunkedCrossEntropy.apply(
                hidden, weight, bias, targets, softcap, label_smoothing, rows
            ),
        )
        return total / (targets != IGNORED).sum() if reduction == "mean" else total


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross entropy, `rows` positions at a time.

    The gradient of the loss is softmax(z) - q for logits z and target distribution q, times
    1 - (z / cap)^2 through the soft cap, and is folded into the gradients of `hidden`, `weight`
    and `bias` while the chunk's logits exist. `backward` only scales them, so no logits are kept
    or computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        label_smoothing: float,
        rows: int,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        grads = None
        if any(ctx.needs_input_grad[:3]):
            grads = (
                torch.empty_like(hidden),
                torch.zeros_like(weight, dtype=torch.float32),
                None if bias is None else torch.zeros_like(bias, dtype=torch.float32),
            )
        for start in range(0, hidden.size(0), rows):
            chunk = slice(start, start + rows)
            logits = soft_cap(F.linear(hidden[chunk], weight, bias).float(), softcap)  # [rows, V]
            log_probabilities = logits.log_softmax(dim=-1)
            total += _smoothed_loss(log_probabilities, targets[chunk], label_smoothing)
            if grads is not None:
                grad = _logit_gradient(log_probabilities, targets[chunk], label_smoothing)
                if softcap is not None:
                    grad.mul_(1 - (logits / softcap).square_())
                if grads[2] is not None:
                    grads[2].add_(grad.sum(dim=0))
                grad = grad.to(weight.dtype)
                torch.mm(grad, weight, out=grads[0][chunk])
                grads[1].add_(grad.mT @ hidden[chunk])
        if grads is not None:
            ctx.save_for_backward(*(None if g is None else g.to(weight.dtype) for g in grads))
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]
        scaled = (None if g is None else g * scale.to(g.dtype) for g in ctx.saved_tensors)
        return *scaled, None, None, None, None


def _smoothed_loss(log_probabilities: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Return the summed cross entropy of rows [rows, V], those with ignored targets left out."""
    nats = F.nll_loss(log_probabilities, targets, ignore_index=IGNORED, reduction="sum")
    if not label_smoothing:
        return nats
    evenly = -log_probabilities.mean(dim=-1).dot((targets != IGNORED).float())
    return (1 - label_smoothing) * nats + label_smoothing * evenly


def _logit_gradient(log_probabilities: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Return softmax minus target distribution [rows, V], 0 where ignored; overwrites its input."""
    predicted = targets != IGNORED
    grad = log_probabilities.exp_().sub_(label_smoothing / log_probabilities.size(1))
    grad.mul_(predicted.unsqueeze(1))
    grad[torch.arange(targets.size(0), device=targets.device), targets.clamp(min=0)] -= (
        1 - label_smoothing
    ) * predicted.to(grad.dtype)
    return grad
