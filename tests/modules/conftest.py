"""Parameters by role, and steps with the same gradients for every optimizer."""

import pytest
import torch
from torch import nn


def _make_roles(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def parameter(*size):
        return nn.Parameter(torch.randn(*size, generator=generator))

    return {
        "matrix": [parameter(8, 8), parameter(16, 8), parameter(8, 8), parameter(8, 16)],
        "embedding": [parameter(10, 8)],
        "head": [parameter(10, 8)],
        "other": [parameter(8)],
    }


def _flat(roles):
    return [parameter for parameters in roles.values() for parameter in parameters]


def _take_steps(roles, optimizers, num_steps=5, start=0):
    for step in range(start, start + num_steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in _flat(roles):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()


@pytest.fixture
def make_roles():
    """Make parameters by role, the same for the same seed."""
    return _make_roles


@pytest.fixture
def flat():
    """List the parameters of all roles."""
    return _flat


@pytest.fixture
def take_steps():
    """Step optimizers with gradients that are a function of the step."""
    return _take_steps
