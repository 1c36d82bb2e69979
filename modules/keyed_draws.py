"""Random numbers that are a function of a sample's key and of what they are drawn for.

Legend: B samples.

No generator and no state: a sample's numbers are the same in any batch, on any number of ranks and
after any resume. The bits are those of `datamodules.order`, in the integers of torch, which wrap
around alike on all devices.
"""

import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # torch's integers are signed
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
_UNIFORM, _NORMAL, _EVALUATION = 1, 2, 3  # so that no two kinds of draws share bits


def uniform(keys: Tensor, purpose: int, *size: int) -> Tensor:
    """Draw numbers in [0, 1), 24 random bits each; equal to the bit on all devices.

    Args:
        keys: int64 [B].
        purpose: What is drawn; numbers of two purposes are independent, whatever their size.
        *size: Of what is drawn for each sample. More of the last dimension of one-dimensional
            draws leaves those before as they were.

    Returns:
        fp32 [B, *size].
    """
    words = _words(keys, purpose, _UNIFORM, math.prod(size))
    return (_shift(words, 40).to(torch.float32) * 2.0**-24).view(-1, *size)


def normal(keys: Tensor, purpose: int, *size: int) -> Tensor:
    """Draw from the standard normal distribution, up to 6.7 in size.

    Two numbers of each 64 random bits (Box and Muller 1958, "A note on the generation of random
    normal deviates"). Logarithms and cosines are in fp64 and then rounded, so that devices, whose
    fp64 differs in its last bits, give the same fp32 but for about one number in a hundred million.

    Args:
        keys: int64 [B].
        purpose: As for `uniform`, of which these draws are independent.
        *size: As for `uniform`.

    Returns:
        fp32 [B, *size].
    """
    count = math.prod(size)
    words = _words(keys, purpose, _NORMAL, (count + 1) // 2)
    # Above 0, so that there is a logarithm.
    radius = (_shift(words, 32) + 1).to(torch.float64).mul_(2.0**-32).log_().mul_(-2).sqrt_()
    angle = (words & 0xFFFFFFFF).to(torch.float64).mul_(2 * math.pi * 2.0**-32)
    pairs = torch.stack([angle.cos().mul_(radius), angle.sin_().mul_(radius)], -1)  # [B, n/2, 2]
    return pairs.to(torch.float32).flatten(1)[:, :count].reshape(-1, *size)


def evaluation_keys(seed: int, positions: Tensor) -> Tensor:
    """Keys of samples that have a number and no other identity.

    Args:
        seed: Not negative.
        positions: int64 [B], numbers of the samples, in whatever order.

    Returns:
        int64 [B].
    """
    return _mix(_mix(_mix(torch.full_like(positions, seed)) ^ _EVALUATION) ^ positions)


def _words(keys: Tensor, purpose: int, kind: int, count: int) -> Tensor:
    """64 random bits each, as int64 [B, count]."""
    own = _mix(_mix(_mix(keys) ^ purpose) ^ kind)  # [B]
    counters = _mix(torch.arange(count, device=keys.device))
    return _mix(own[:, None] ^ counters)


def _mix(values: Tensor) -> Tensor:
    """As `datamodules.order.splitmix64` (Steele, Lea and Flood 2014, fig. 16); int64."""
    mixed = values + _GOLDEN
    mixed = mixed.bitwise_xor_(_shift(mixed, 30)).mul_(_MIX_1)
    mixed = mixed.bitwise_xor_(_shift(mixed, 27)).mul_(_MIX_2)
    return mixed.bitwise_xor_(_shift(mixed, 31))


def _shift(values: Tensor, bits: int) -> Tensor:
    """Shift to the right as if unsigned; torch's shift repeats the sign."""
    return (values >> bits).bitwise_and_((1 << (64 - bits)) - 1)
