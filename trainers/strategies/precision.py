"""fp32, bf16 or fp16 as autocast around every strategy, and steps called off on the device."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import Precision
from torch import Tensor
from torch.optim import Optimizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Autocast(Precision):
    """Runs every step under autocast and leaves backward to the strategy.

    Autocast decides what is computed in low precision, whatever dtype the strategy keeps the
    parameters in (`docs/parallelism.md` has the table).
    """

    def __init__(self, precision: str, device_type: str):
        """Take `precision=fp32|bf16|fp16` and the kind of device, `cpu` or `cuda`."""
        self.dtype = DTYPES[precision]
        self.device_type = device_type
        self.strategy: Any = None  # set where there are gradients to scale

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Autocast, without its cache: sharded parameters change under it."""
        is_low = self.dtype != torch.float32
        with torch.autocast(
            self.device_type,
            dtype=self.dtype if is_low else None,
            enabled=is_low,
            cache_enabled=False,
        ):
            yield

    def backward(
        self, tensor: Tensor, model: LightningModule, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Differentiate as the strategy does.

        Outside of autocast, under which a module that calls this within its step still is: the
        engine would take it over for the second derivatives of penalties.
        """
        with torch.autocast(self.device_type, enabled=False):
            self.strategy.differentiate(tensor, *args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """The loss scales."""
        return self.strategy.loss_scale_state() if self.strategy else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with saved loss scales."""
        self.strategy.load_loss_scale_state(state_dict)


def call_off(optimizer: Optimizer, veto: Tensor) -> None:
    """Make an optimizer's next step do nothing where the device finds `veto` true.

    By the protocol between `torch.amp.GradScaler` and fused optimizers, which read `found_inf` on
    the device: nobody waits for it. For an optimizer that does not read it, the host waits.

    Raises:
        StepCalledOff: The step is not to be taken, and the optimizer would not see that.
    """
    is_fused = all(group.get("fused") for group in optimizer.param_groups)
    if not (is_fused or hasattr(optimizer, "found_inf")):
        if veto:
            raise StepCalledOff
        return
    first = next(p for group in optimizer.param_groups for p in group["params"])
    # Waits where parameters are in the host's memory: the optimizer would look too early.
    found_inf = veto.float().to(first.device)
    optimizer.grad_scale, optimizer.found_inf = None, found_inf  # type: ignore[attr-defined]
    if isinstance(optimizer, torch.optim.SGD):
        _begin_momentum(optimizer)


class StepCalledOff(Exception):
    """A step is not to be taken."""


def _begin_momentum(optimizer: torch.optim.SGD) -> None:
    # torch 2.13 would keep a momentum without values where the very first step is called off.
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else []:
            if parameter.grad is None:
                continue  # frozen, say
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def step_unless(veto: Tensor | None, optimizer: Optimizer) -> None:
    """Step, or leave everything as it is where `veto` is true."""
    if veto is None:
        optimizer.step()
        return
    with suppress(StepCalledOff):
        call_off(optimizer, veto)
        optimizer.step()
    if "found_inf" in vars(optimizer):
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
