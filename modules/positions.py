"""Positions of tokens: rotary, sinusoidal, relative, and within documents.

Legend: B batch, T tokens, S keys, D width, H heads, W head width.

Tables are computed in fp32 at each forward pass rather than kept in buffers, which casting a
module would round.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


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


def rotary_tables(positions: Tensor, head_width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary position embedding.

    Su et al. 2021, arXiv 2104.09864, equation 15, with theta_i = base^(-2i / W).

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


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Fixed position vectors, sines and cosines of geometrically spaced wavelengths.

    Vaswani et al. 2017, arXiv 1706.03762, section 3.5; all sines come before all cosines, as in
    the authors' code, where the paper's formula alternates them.

    Args:
        positions: int64 [T].
        width: D, even.

    Returns:
        fp32 [T, D].
    """
    half = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32)
    angles = positions.float().unsqueeze(-1) * 10000.0 ** (-half / width)  # [T, D/2]
    return torch.cat([angles.sin(), angles.cos()], -1)


def relative_buckets(
    queries: Tensor, keys: Tensor, *, num_buckets: int, max_distance: int, bidirectional: bool
) -> Tensor:
    """Sort distances into buckets that share a bias: exact near by, logarithmic farther away.

    Raffel et al. 2020, arXiv 1910.10683, section 2.1, with the boundaries of the authors' code.

    Args:
        queries: int64 [T], their positions.
        keys: int64 [S], their positions.
        num_buckets: Number of buckets. `bidirectional`, half of them are for later keys; else all
            later keys are in bucket 0.
        max_distance: From here on all distances are in the last bucket.
        bidirectional: Whether queries look at later keys.

    Returns:
        int64 [T, S], from 0 to `num_buckets` - 1.
    """
    distance = queries[:, None] - keys[None, :]  # [T, S]
    first: Tensor | int = 0
    if bidirectional:
        num_buckets //= 2
        first = (distance < 0) * num_buckets
        distance = distance.abs()
    else:
        distance = distance.clamp(min=0)
    num_exact = num_buckets // 2
    fraction = torch.log(distance.clamp(min=1).float() / num_exact)
    fraction = fraction / math.log(max_distance / num_exact)
    far = num_exact + (fraction * (num_buckets - num_exact)).long()
    far = far.clamp(max=num_buckets - 1)
    return first + torch.where(distance < num_exact, distance, far)
