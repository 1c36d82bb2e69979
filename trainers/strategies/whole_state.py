"""State by parameter name, the same under every strategy: what one saves, any other can read."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer


class WholeState(DDPStrategy):
    """Saves whole values and takes them back; a strategy says how one value is put together."""

    @property
    def module(self) -> LightningModule:
        """The user's module."""
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The module's networks by name."""
        return dict(getattr(self.module, "parts", None) or {"model": self.module})

    # -- what a strategy says --------------------------------------------------------------------

    def release_weights(self) -> None:
        """Give back weights that are whole for a while only."""

    def whole(self, value: Tensor) -> Tensor:
        """A parameter or buffer, whole and not rounded; collective."""
        return value.detach()

    def take(self, value: Tensor, whole: Tensor) -> None:
        """Set a parameter or buffer, or what this rank has of it; collective."""
        value.detach().copy_(whole)

    def whole_state(self, optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
        """What an optimizer remembers of a parameter, whole; collective."""
        return optimizer.state.get(parameter, {})

    def take_state(
        self, optimizer: Optimizer, parameter: nn.Parameter, key: str, value: Any
    ) -> None:
        """Let an optimizer remember one thing of a parameter; tensors are copies, and placed."""
        optimizer.state[parameter][key] = value

    # -- what it gives --------------------------------------------------------------------------

    def whole_parameters(self, part: str) -> Iterator[tuple[str, Tensor]]:
        """Whole fp32 values of a part, one at a time, on every rank; collective.

        For what is a function of the weights, such as a moving average: `self.trainer.strategy` is
        the same to a module whatever shards there are.
        """
        self.release_weights()
        for name, parameter in self.parts[part].named_parameters():
            yield name, self.whole(parameter)

    def parameter_names(self) -> dict[nn.Parameter, str]:
        """Name of each parameter in the module's state dict."""
        self.release_weights()
        return {parameter: name for name, parameter in self.module.named_parameters()}

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Parameters and buffers on the CPU of rank 0, nothing elsewhere; collective."""
        self.release_weights()
        own = self.module.state_dict(keep_vars=True)
        wholes: dict[Tensor, Tensor | None] = {}  # what has two names has one value
        for value in own.values():
            if value not in wholes:
                whole = self.whole(value)
                wholes[value] = whole.cpu() if self.is_global_zero else None
        return {n: wholes[value] for n, value in own.items()} if self.is_global_zero else {}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take parameters and buffers, one at a time.

        Raises:
            ValueError: Names (if `strict`) or shapes differ.
        """
        self.release_weights()
        saved, own = checkpoint["state_dict"], self.module.state_dict(keep_vars=True)
        refuse_other_weights(own, saved, strict)
        for name in [name for name in own if name in saved]:
            self.take(own[name], saved[name])

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """An optimizer's state on rank 0, nothing elsewhere; collective.

        Returns:
            `state`: parameter's name -> whole state on the CPU; `param_groups`: the groups with
            names for parameters.
        """
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        names, state = self.parameter_names(), {}
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            values = self.whole_state(optimizer, parameter)
            if self.is_global_zero and values:
                state[names[parameter]] = {
                    key: value.cpu() if isinstance(value, Tensor) else value
                    for key, value in values.items()
                }
        if not self.is_global_zero:
            return {}
        return {"state": state, "param_groups": named_groups(optimizer, names)}

    @torch.no_grad()
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give each optimizer its state back."""
        names = self.parameter_names()
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            load_groups(optimizer, saved, names)
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    values = saved["state"].get(names[parameter], {})
                    for key, value in placed(values, group, parameter.device).items():
                        self.take_state(optimizer, parameter, key, value)


def refuse_other_weights(own: Mapping[str, Any], saved: Mapping[str, Any], strict: bool) -> None:
    """Compare saved weights with a module's.

    Args:
        own: Its state dict, where ZeRO-3 may have emptied parameters.
        saved: Whole tensors by name.
        strict: Whether to refuse missing and unexpected names.

    Raises:
        ValueError: Names or shapes differ.
    """
    faults = []
    if strict:
        faults += [f"{name} is missing" for name in own if name not in saved]
        faults += [f"{name} is unexpected" for name in saved if name not in own]
    for name in own.keys() & saved.keys():
        here, there = list(getattr(own[name], "ds_shape", own[name].shape)), list(saved[name].shape)
        if here != there:
            faults.append(f"{name} is {there} there and {here} here")
    if faults:
        raise ValueError(
            f"checkpoint -> its weights are of another module ({'; '.join(sorted(faults)[:3])}) -> "
            "use the module it was trained with, or start anew with init_from"
        )


def named_groups(optimizer: Optimizer, names: Mapping[Parameter, str]) -> list[dict[str, Any]]:
    """The groups of an optimizer with names in place of parameters."""
    return [
        {**group, "params": [names[parameter] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]


def load_groups(
    optimizer: Optimizer, saved: Mapping[str, Any], names: Mapping[Parameter, str]
) -> None:
    """Give the groups their saved settings back.

    Raises:
        ValueError: The groups hold other parameters than they did.
    """
    mine = named_groups(optimizer, names)
    if [g["params"] for g in mine] != [g["params"] for g in saved["param_groups"]]:
        raise ValueError(
            "checkpoint -> its optimizer groups other parameters than this module's does -> use "
            "the module and optimizer it was trained with, or start anew with init_from"
        )
    for group, settings in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({key: value for key, value in settings.items() if key != "params"})


def placed(
    values: Mapping[str, Any], group: Mapping[str, Any], device: torch.device
) -> dict[str, Any]:
    """Copies of a parameter's saved state where the optimizer of its group keeps it."""
    # Optimizers that are not fused count their steps on the CPU.
    is_host = not (group.get("fused") or group.get("capturable"))
    devices = {"step": torch.device("cpu")} if is_host else {}
    return {
        key: value.to(devices.get(key, device), copy=True) if isinstance(value, Tensor) else value
        for key, value in values.items()
    }
