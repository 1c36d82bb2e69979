"""Gradients that come in one order, whatever the lengths of a batch."""

from typing import Any

import torch
from torch import Tensor, nn


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Give a module's own parameters by name, with their gradients to be finished together.

    A network that goes through time step by step finishes its gradients in an order that depends on
    how many steps there are. DeepSpeed's ZeRO 1 and 2 lay gradients side by side as they come and
    add the ranks' up place by place: ranks with different lengths would add gradients of different
    parameters, without a word. Through one node of the graph they come in the order of the
    parameters.
    """
    names, parameters = zip(*module.named_parameters(recurse=False), strict=True)
    if not torch.is_grad_enabled():
        return dict(zip(names, parameters, strict=True))
    return dict(zip(names, _Together.apply(*parameters), strict=True))  # type: ignore[arg-type]


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> tuple[Tensor, ...]:
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        return grad_outputs
