"""One rank in plain torch that keeps its parameters in low precision, as ZeRO does in fp16.

Nothing of DeepSpeed is in it: what rounding the parameters costs by itself.
"""

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from trainers.stored_tensors import Run
from trainers.strategies.replicated import Single


class KeptLow(Single):
    """The model computes with low parameters; steps are of fp32 masters by fp32 gradients."""

    def distribute_optimizers(self) -> None:
        """Lay the masters aside."""
        super().distribute_optimizers()
        self.masters: dict[Tensor, Tensor] = {}
        self.gradients: dict[nn.Parameter, Tensor] = {}
        for parameter in self.module.parameters():
            self.masters[parameter] = parameter.data
            parameter.data = parameter.data.to(self.dtype)

    def backward_of(self, part: str, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Differentiate; add micro-batches up in fp32."""
        super().backward_of(part, loss, *args, **kwargs)
        for parameter in self.parameters(part):
            if parameter.grad is not None:
                gradient, parameter.grad = parameter.grad.float(), None
                self.gradients[parameter] = self.gradients.get(parameter, 0) + gradient

    def finish_gradients(self, part: str) -> None:
        """Show the optimizer masters and their gradients in the parameters' place."""
        for parameter in self.parameters(part):
            parameter.data = self.masters[parameter]
            parameter.grad = self.gradients.pop(parameter, None)

    def step_part(self, part: str, optimizer: Optimizer) -> None:
        """Step, and round the masters."""
        super().step_part(part, optimizer)
        for parameter in self.parameters(part):
            parameter.grad = None
            parameter.data = self.masters[parameter].to(self.dtype)

    def whole(self, value: Tensor) -> Tensor:
        """What is averaged: a master; of what has none, the value."""
        return self.masters.get(value, value).detach()

    def held(self, value: Tensor) -> Run:
        """What is saved, likewise."""
        return Run.whole(self.masters[value]) if value in self.masters else super().held(value)
