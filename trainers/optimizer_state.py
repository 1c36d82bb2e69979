"""Optimizer state by parameter name: what any strategy saves and any other can read."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer


def named_state(optimizer: Optimizer, names: Mapping[Any, str]) -> dict[str, Any]:
    """Give an optimizer's state by parameter name.

    Args:
        optimizer: On whole parameters.
        names: Of the parameters.

    Returns:
        `state`: name -> state of that parameter; `param_groups`: the groups, names for parameters.
    """
    state = {names[p]: dict(values) for p, values in optimizer.state.items()}
    return {"state": state, "param_groups": named_groups(optimizer, names)}


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


@torch.no_grad()
def load_named_state(
    optimizer: Optimizer, saved: Mapping[str, Any], names: Mapping[Parameter, str]
) -> None:
    """Give an optimizer on whole parameters the state of `named_state`."""
    load_groups(optimizer, saved, names)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if (values := saved["state"].get(names[parameter])) is not None:
                optimizer.state[parameter] = {
                    key: _placed(key, value, group, parameter.device)
                    for key, value in values.items()
                }


def _placed(key: str, value: Any, group: Mapping[str, Any], device: torch.device) -> Any:
    if not isinstance(value, Tensor):
        return value
    # Optimizers that are not fused count their steps on the CPU.
    is_host = key == "step" and not (group.get("fused") or group.get("capturable"))
    return value.to("cpu" if is_host else device, copy=True)
