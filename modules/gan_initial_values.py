"""Initial values of the GAN family's layers: each fills a tensor, from a generator where random."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Draw = Callable[[Tensor, torch.Generator], None]
"""What one parameter of a layer is filled by; weights have outputs first, kernels last."""


def zeros(value: Tensor, generator: torch.Generator) -> None:
    """Fill with 0."""
    value.zero_()


def ones(value: Tensor, generator: torch.Generator) -> None:
    """Fill with 1."""
    value.fill_(1.0)


def normal(value: Tensor, generator: torch.Generator, deviation: float = 1.0) -> None:
    """Draw from N(0, deviation^2)."""
    value.normal_(0.0, deviation, generator=generator)


def glorot_uniform(value: Tensor, generator: torch.Generator, gain: float = 1.0) -> None:
    """Draw uniformly within gain sqrt(6 / (fan in + fan out)) (Glorot and Bengio 2010)."""
    fans = (value.size(0) + value.size(1)) * value.shape[2:].numel()
    bound = gain * math.sqrt(6 / fans)
    value.uniform_(-bound, bound, generator=generator)


def scaled_normal(value: Tensor, generator: torch.Generator, gain: float = 1.0) -> None:
    """Draw from N(0, gain^2 / fan in) (He et al. 2015, arXiv 1502.01852)."""
    value.normal_(0.0, gain / math.sqrt(value.shape[1:].numel()), generator=generator)
