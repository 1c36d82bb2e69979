"""Values for parameters without storage: each drawn whole, handed over, and gone before the next.

A module may be built on torch's meta device and say its values by `initial_value(name)`, a whole
fp32 tensor on the CPU. Every rank draws them all and keeps what is its own, so nothing is sent, a
model that fits on no single device can start, and it starts the same under every strategy.
"""

from collections.abc import Callable, Collection

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

Keep = Callable[[nn.Module, str, nn.Parameter, Tensor], None]
"""(leaf module, parameter's name in the LightningModule, parameter, whole value) -> None."""


def names_on_meta(module: nn.Module) -> list[str]:
    """Names of the parameters that have no storage; a shared one has its first name only."""
    return [name for name, parameter in module.named_parameters() if parameter.is_meta]


def refuse_buffers_on_meta(module: LightningModule) -> None:
    """Check that all buffers have values: `initial_value` is for parameters.

    Raises:
        ValueError: One is on the meta device.
    """
    for name, buffer in module.named_buffers():
        if buffer.is_meta:
            raise ValueError(
                f"module={type(module).__name__} -> its buffer `{name}` is on the meta device, and "
                'only parameters get initial values -> make it with device="cpu"'
            )


def give_initial_values(module: LightningModule, names: Collection[str], keep: Keep) -> None:
    """Draw the named parameters' values, leaf module by leaf module, and pass each to `keep`.

    A callback and not a generator: the variables of a loop would hold one whole tensor while the
    next is drawn. `keep` must not hold it either.

    Args:
        module: Has `initial_value`.
        names: As `names_on_meta` gave them. The parameters may have storage or shards by now.
        keep: Takes the leaf module, name, parameter and value.

    Raises:
        ValueError: The module does not say initial values, or says one of another shape.
    """
    if names and not hasattr(module, "initial_value"):
        raise ValueError(
            f"module={type(module).__name__} -> its parameters ({next(iter(names))}, ...) are on "
            "the meta device and it does not say their values -> give it `initial_value(name)` "
            "(docs/adding.md), or build it on the CPU"
        )
    wanted = set(names)
    for prefix, leaf in module.named_modules():
        for name, parameter in leaf.named_parameters(prefix, recurse=False):
            if name in wanted:
                keep(leaf, name, parameter, _draw(module, name, parameter))


def _draw(module: LightningModule, name: str, parameter: nn.Parameter) -> Tensor:
    # Lightning may have made an accelerator the default device, whose draws are others.
    with torch.no_grad(), torch.device("cpu"):
        value = module.initial_value(name)  # type: ignore[operator]
    if value.shape != parameter.shape:
        raise ValueError(
            f"module={type(module).__name__} -> initial_value('{name}') has the shape "
            f"{list(value.shape)} and the parameter {list(parameter.shape)} -> make them equal"
        )
    return value
