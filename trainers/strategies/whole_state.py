"""State by parameter name, the same under every strategy: what one saves, any other can read.

Each rank saves what it holds and reads what it needs (`trainers/stored_tensors.py`); nothing is
gathered.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from trainers.stored_tensors import Run, Stored, deal, is_elementwise


class WholeState(DDPStrategy):
    """Saves and takes state back; a strategy says what of one value is on this rank."""

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

    def held(self, value: Tensor) -> Run:
        """What this rank is to save of a parameter or buffer, not rounded; a view if it can be."""
        run = Run.whole(value)
        if isinstance(value, nn.Parameter):
            return run
        # Buffers may differ between ranks: they are those of the first.
        return replace(run, is_copied=False) if self.is_global_zero else run.without_values()

    def take(self, value: Tensor, stored: Stored) -> None:
        """Set a parameter or buffer, or what this rank has of it; collective."""
        value.detach().copy_(stored.whole())

    def held_state(self, optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
        """What this rank is to save of what an optimizer remembers of a parameter.

        Returns:
            Key -> `Run` where there is a value for each element, on every rank; else the value.
        """
        state = optimizer.state.get(parameter, {})
        return {
            key: Run.whole(value) if is_elementwise(key, value, parameter.shape) else value
            for key, value in state.items()
        }

    def take_state(
        self, optimizer: Optimizer, parameter: nn.Parameter, key: str, value: Any
    ) -> None:
        """Let an optimizer remember one thing of a parameter; tensors are copies, and placed.

        Args:
            optimizer: It.
            parameter: Whole or a shard.
            key: What.
            value: `Stored` where there is a value for each element.
        """
        if isinstance(value, Stored):
            value = value.whole().to(parameter.device)
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
        """What this rank is to save of parameters and buffers: name -> `Run`."""
        self.release_weights()
        own = self.module.state_dict(keep_vars=True)
        names: dict[Tensor, str] = {}
        for name, value in own.items():
            names.setdefault(value, name)  # what has two names is one value, and saved once
        runs = {name: self.held(value) for value, name in names.items()}
        mine = deal(runs, self.global_rank, self.world_size)
        return {name: mine[names[value]] for name, value in own.items()}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Save what every rank holds."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take parameters and buffers, one at a time.

        Raises:
            ValueError: Names (if `strict`) or shapes differ.
        """
        self.release_weights()
        saved, own = checkpoint["state_dict"], self.module.state_dict(keep_vars=True)
        refuse_other_weights(own, saved, strict)
        for name in [name for name in own if name in saved]:
            value = saved[name]  # a tensor, where a hook of the module has put one
            self.take(own[name], value if isinstance(value, Stored) else Stored.of(value))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """What this rank is to save of an optimizer's state.

        Returns:
            `state`: parameter's name -> key -> `Run`, or the value where it has none for each
            element; `param_groups`: the groups with names for parameters.
        """
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        names = self.parameter_names()
        state: dict[str, dict[str, Any]] = {}
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if values := self.held_state(optimizer, parameter):
                state[names[parameter]] = dict(values)
        runs = {
            f"{key}/{name}": value
            for name, values in state.items()
            for key, value in values.items()
            if isinstance(value, Run)
        }
        for full, run in deal(runs, self.global_rank, self.world_size).items():
            key, name = full.split("/", 1)
            state[name][key] = run
        return {"state": state, "param_groups": named_groups(optimizer, names)}

    @torch.no_grad()
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give each optimizer its state back, unless it was left out."""
        if not checkpoint["optimizer_states"]:
            return
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
        saved: What was saved, by name.
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
