"""Pieces of transformers that several families share, and the loss over large vocabularies.

Legend: B batch, T tokens, S keys (T without a cache), D width, H heads, K key-value heads,
W head width, V vocabulary, N positions of the whole batch (B x T).
"""

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.batch import IGNORED

PLAIN_LOGITS_BYTES = 32 * 2**20
"""Up to this size (as fp32) all logits are made at once, the fastest form; above, in chunks."""

Reduction = Literal["mean", "sum"]


def table_of(embedding: nn.Embedding) -> Tensor:
    """The table of an embedding, [rows, D]; under autocast in fp32.

    There a strategy may keep it in low precision. So what is looked up, the residual stream, is
    fp32 as everywhere, and its gradient is summed in fp32 and rounded once, where bf16 would stop
    adding at 256 occurrences of a token.
    """
    weight = embedding.weight
    return weight.float() if torch.is_autocast_enabled(weight.device.type) else weight


def document_positions(documents: Tensor) -> Tensor:
    """Position of each token within its document.

    Args:
        documents: int32 [B, T], the document's number within the row; documents are contiguous.

    Returns:
        int64 [B, T], 0 at the first token of each document.
    """
    index = torch.arange(documents.size(1), device=documents.device)  # [T]
    is_start = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return index - torch.where(is_start, index, 0).cummax(dim=1).values


def document_mask(documents: Tensor) -> Tensor:
    """Block-diagonal causal mask: a token attends to earlier ones of its own document.

    Args:
        documents: int32 [B, T], the document's number within the row.

    Returns:
        bool [B, 1, T, T], true where a query (third axis) may look at a key (fourth axis).
    """
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same.tril()


def rotary_tables(positions: Tensor, head_width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary position embedding.

    Su et al. 2021, arXiv 2104.09864, equation 15, with theta_i = base^(-2i / W). Computed in fp32
    at each forward pass rather than kept in a buffer, which casting the module would round.

    Args:
        positions: int64 [T] or [B, T].
        head_width: W, even.
        base: Base of the geometric series of wavelengths.

    Returns:
        Two fp32 tensors, [T, 1, W] or [B, T, 1, W]: the cosines, and the sines with the first
        half negated, as `apply_rotary` takes them.
    """
    half = torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32)
    angles = positions.float().unsqueeze(-1) * base ** (-half / head_width)  # [..., T, W/2]
    cos, sin = angles.unsqueeze(-2).cos(), angles.unsqueeze(-2).sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def apply_rotary(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (i, i + W/2) of `x` [B, T, H, W]; the pairing of Llama and GPT-NeoX."""
    cos, sin = tables
    return (x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin).to(x.dtype)


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

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store `keys` and `values` [B, K, T, W] of one layer; return all so far [B, K, S, W]."""
        end = self.length + keys.size(2)
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


def attention(
    queries: Tensor, keys: Tensor, values: Tensor, *, mask: Tensor | None, dropout: float
) -> Tensor:
    """Causal scaled dot-product attention, softmax(Q K^T / sqrt(W)) V.

    Vaswani et al. 2017, arXiv 1706.03762, equation 1; heads of queries share keys and values in
    groups of H / K (Ainslie et al. 2023, arXiv 2305.13245).

    Args:
        queries: [B, H, T, W].
        keys: [B, K, S, W]; S is T, or T is 1 and the query is the last of S tokens.
        values: Like `keys`.
        mask: bool [B, 1, T, S], true where a query may look; None for plain causal attention.
        dropout: Probability with which an attention weight is dropped.

    Returns:
        [B, H, T, W] in the dtype of `queries`.
    """
    dtype = queries.dtype
    assert keys.size(2) == queries.size(2) or queries.size(2) == 1
    with torch.autocast(queries.device.type, enabled=False):
        if queries.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
            # On CPU the half-precision kernel is the slower one: forward and backward of
            # [12, 4, 64, 32] took 7.6 ms in bf16 and 1.8 ms in fp32 on one AVX-512 core.
            queries, keys, values = queries.float(), keys.float(), values.float()
        return F.scaled_dot_product_attention(
            queries,
            keys.to(queries.dtype),
            values.to(queries.dtype),
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None and queries.size(2) > 1,
            enable_gqa=keys.size(1) != queries.size(1),
        ).to(dtype)


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """Bound logits to (-cap, cap) by cap * tanh(logits / cap); Gemma 2, arXiv 2408.00118, 2.2."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    softcap: float | None,
    reduction: Reduction,
) -> Tensor:
    """Cross entropy of `softcap(hidden @ weight.T)` without holding all logits when they are big.

    Small logits are made at once. Big ones take torch's chunked `F.linear_cross_entropy` where
    torch has it (2.13) and no soft cap is asked for, else `_ChunkedCrossEntropy`. Both compute the
    gradients in the forward pass, chunk by chunk, each chunk's logits no larger than the larger of
    `hidden` and `weight`. Under autocast the products run in its dtype; softmax and sum are fp32.

    Args:
        hidden: [..., D].
        weight: [V, D].
        targets: int64 [...], `IGNORED` where nothing is predicted.
        softcap: Bound of `soft_cap`, or None.
        reduction: `sum` over the predicted targets, or their `mean` (nan where there are none).

    Returns:
        fp32 scalar, in nats.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()  # [N, D], [N]
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(device, enabled=False):
        if 4 * hidden.size(0) * weight.size(0) <= PLAIN_LOGITS_BYTES:
            logits = soft_cap(F.linear(hidden, weight).float(), softcap)
            return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction=reduction)
        rows = max(hidden.numel(), weight.numel()) // weight.size(0)
        # On CPU torch's form computes half precision in fp32: 3.5 s against 1.8 s of ours for
        # 2,048 positions, width 384 and 32,768 tokens on one core; in fp32 it leads, 2.5 to 3.8.
        is_slow = device == "cpu" and hidden.dtype != torch.float32
        if softcap is None and hasattr(nn, "LinearCrossEntropyOptions") and not is_slow:
            options = nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=rows)
            return F.linear_cross_entropy(
                hidden, weight, targets, ignore_index=IGNORED, reduction=reduction, options=options
            ).float()
        total = cast(Tensor, _ChunkedCrossEntropy.apply(hidden, weight, targets, softcap, rows))
        return total / (targets != IGNORED).sum() if reduction == "mean" else total


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross entropy, `rows` positions at a time.

    The gradient of the loss is (softmax(z) - onehot) for logits z, times 1 - (z / cap)^2 through
    the soft cap, and is folded into the gradients of `hidden` and `weight` while the chunk's
    logits exist. `backward` only scales them, so no logits are kept or computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, rows: int
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        grads = None
        if any(ctx.needs_input_grad[:2]):
            grads = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, hidden.size(0), rows):
            chunk = slice(start, start + rows)
            logits = soft_cap(F.linear(hidden[chunk], weight).float(), softcap)  # [rows, V]
            log_probabilities = logits.log_softmax(dim=-1)
            total += F.nll_loss(
                log_probabilities, targets[chunk], ignore_index=IGNORED, reduction="sum"
            )
            if grads is not None:
                grad = _logit_gradient(log_probabilities, targets[chunk])
                if softcap is not None:
                    grad.mul_(1 - (logits / softcap).square_())
                grad = grad.to(weight.dtype)
                torch.mm(grad, weight, out=grads[0][chunk])
                grads[1].add_(grad.mT @ hidden[chunk])
        if grads is not None:
            ctx.save_for_backward(grads[0], grads[1].to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_outputs[0]
        return (
            grad_hidden * scale.to(grad_hidden.dtype),
            grad_weight * scale.to(grad_weight.dtype),
            None,
            None,
            None,
        )


def _logit_gradient(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """Return softmax minus one-hot [rows, V], zero where ignored; overwrites its first argument."""
    predicted = targets != IGNORED
    grad = log_probabilities.exp_().mul_(predicted.unsqueeze(1))
    grad[torch.arange(targets.size(0), device=targets.device), targets.clamp(min=0)] -= (
        predicted.to(grad.dtype)
    )
    return grad
