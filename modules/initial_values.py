"""Draws of initial values that depend on the seed and a parameter's name alone."""

import hashlib

import torch


def generator_for(name: str, seed: int) -> torch.Generator:
    """Make the generator, on the CPU, that one parameter's initial value is drawn from.

    So any subset of parameters, on any rank and in any order, starts at the same values.

    Args:
        name: Of the parameter.
        seed: Of the run.
    """
    key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    # 63 bits: torch takes seeds as signed integers.
    return torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
