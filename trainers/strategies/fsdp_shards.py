"""The shards of FSDP2: how ranks are laid out, whole tensors to shards and back one by one."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from trainers.optimizer_state import load_named_state

Slots = list[tuple[nn.Module, str, nn.Parameter]]
"""(leaf module, attribute, shard) of a network's parameters."""


def lay_out(device_type: str, num_ranks: int, shard_size: int | None) -> DeviceMesh:
    """Arrange ranks as copies of the model, each of `shard_size` neighbours; None: one copy."""
    if shard_size is None:
        return init_device_mesh(device_type, (num_ranks,), mesh_dim_names=("shard",))
    assert num_ranks % shard_size == 0, (num_ranks, shard_size)
    sizes = (num_ranks // shard_size, shard_size)
    return init_device_mesh(device_type, sizes, mesh_dim_names=("replicate", "shard"))


def follow(slots: Slots) -> None:
    """Let gathered weights require gradients as their shards do: toggling reaches only those."""
    for leaf, name, shard in slots:
        parameter = leaf.get_parameter(name)
        if parameter.requires_grad != shard.requires_grad:
            parameter.requires_grad_(shard.requires_grad)


def shard_of(value: Tensor, like: DTensor) -> Tensor:
    """This rank's piece of a whole tensor, cut as `like` is; a view, nothing is sent."""
    coordinate = like.device_mesh.get_coordinate()
    assert coordinate is not None
    for placement, ranks, index in zip(
        like.placements, like.device_mesh.shape, coordinate, strict=True
    ):
        if isinstance(placement, Shard):
            pieces = value.chunk(ranks, placement.dim)  # fewer than ranks where rows are few
            nothing = value.narrow(placement.dim, 0, 0)
            value = pieces[index] if index < len(pieces) else nothing
    return value


@torch.no_grad()
def keep_shard(leaf: nn.Module, name: str, parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter, or this rank's shard of it, its values (`initial_values.Keep`)."""
    if isinstance(parameter, DTensor):
        parameter.to_local().copy_(shard_of(value, parameter))
    else:
        parameter.copy_(value)


def gather(value: Any, device: torch.device) -> Any:
    """Make a sharded tensor whole, by way of the device that ranks send from; collective.

    Anything else stays what it is, without its graph.
    """
    if isinstance(value, DTensor):
        return cast(DTensor, value.detach().to(device)).full_tensor()
    return value.detach() if isinstance(value, Tensor) else value


class FusedOnShards(TorchFunctionMode):
    """Lets fused SGD step on shards, each by itself.

    torch 2.13 has rules for fused Adam and AdamW on `DTensor` and none for SGD.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch._fused_sgd_:  # pyright: ignore[reportPrivateImportUsage]
            args, kwargs = tree_map_only(DTensor, DTensor.to_local, (args, kwargs))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def load_weights(module: nn.Module, saved: Mapping[str, Any], strict: bool) -> None:
    """Copy saved parameters and buffers into a module with shards.

    Args:
        module: Not gathered anywhere.
        saved: Whole tensors by name, asked for one at a time.
        strict: Whether to refuse missing and unexpected names.

    Raises:
        ValueError: Names or shapes differ.
    """
    own = module.state_dict()
    faults = []
    if strict:
        faults += [f"{name} is missing" for name in own if name not in saved]
        faults += [f"{name} is unexpected" for name in saved if name not in own]
    rest = {}
    for name, tensor in own.items():
        if name not in saved:
            continue
        value = saved[name]
        if isinstance(tensor, Tensor) and value.shape != tensor.shape:
            faults.append(f"{name} is {list(value.shape)} there and {list(tensor.shape)} here")
        elif isinstance(tensor, DTensor):
            tensor.to_local().copy_(shard_of(value, tensor))
        else:
            rest[name] = value
    if faults:
        raise ValueError(
            f"checkpoint -> its weights are of another module ({'; '.join(faults[:3])}) -> use the "
            "module it was trained with, or start anew with init_from"
        )
    module.load_state_dict(rest, strict=False)


@torch.no_grad()
def load_sharded_state(
    optimizer: Optimizer, saved: Mapping[str, Any], names: Mapping[nn.Parameter, str]
) -> None:
    """Give an optimizer on shards the state of `trainers.optimizer_state.named_state`.

    Tensors of a parameter's shape are cut as the parameter is; others, such as counts of steps,
    are taken whole.
    """
    parameters = {name: parameter for parameter, name in names.items()}

    def is_cut(name: str, value: Any) -> bool:
        parameter = parameters.get(name)
        return (
            isinstance(value, Tensor)
            and isinstance(parameter, DTensor)
            and value.shape == parameter.shape
        )

    others = {
        name: {key: value for key, value in values.items() if not is_cut(name, value)}
        for name, values in saved["state"].items()
    }
    load_named_state(optimizer, {**saved, "state": others}, names)
    for name, values in saved["state"].items():
        for key, value in values.items():
            if is_cut(name, value):
                shard = cast(DTensor, torch.empty_like(parameters[name]))
                shard.to_local().copy_(shard_of(value, shard))
                optimizer.state[parameters[name]][key] = shard
