"""State by parameter name: what any strategy saves and any other can read."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer


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
