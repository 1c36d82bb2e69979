"""The shards of FSDP2: how ranks are laid out, whole tensors to shards and back one by one."""

from datetime import timedelta
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.tensor import DTensor, Shard
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from trainers.stored_tensors import Run, Stored

Slots = list[tuple[nn.Module, str, nn.Parameter]]
"""(leaf module, attribute, shard) of a network's parameters."""


def make_mesh(
    device_type: str, num_ranks: int, shard_size: int | None, timeout: timedelta
) -> DeviceMesh:
    """Arrange ranks as copies of the model, each of `shard_size` neighbours; None: one copy."""
    if shard_size is None:
        return init_device_mesh(device_type, (num_ranks,), mesh_dim_names=("shard",))
    assert num_ranks % shard_size == 0, (num_ranks, shard_size)
    names, sizes = ("replicate", "shard"), (num_ranks // shard_size, shard_size)
    mesh = init_device_mesh(device_type, sizes, mesh_dim_names=names)
    for name in names:  # new groups have torch's default
        _set_pg_timeout(timeout, mesh.get_group(name))
    return mesh


def follow(slots: Slots) -> None:
    """Let gathered weights require gradients as their shards do: toggling reaches only those."""
    for leaf, name, shard in slots:
        parameter = leaf.get_parameter(name)
        if parameter.requires_grad != shard.requires_grad:
            parameter.requires_grad_(shard.requires_grad)


def run_of(shard: DTensor) -> tuple[Run, bool]:
    """The elements that this rank has of a tensor cut by rows, and whether it is to save them.

    Of several copies of the model the first does.
    """
    coordinate = shard.device_mesh.get_coordinate()
    assert coordinate is not None
    begin, is_first = 0, True
    for placement, ranks, index in zip(
        shard.placements, shard.device_mesh.shape, coordinate, strict=True
    ):
        if isinstance(placement, Shard):
            assert placement.dim == 0, placement
            begin = min(index * -(-shard.shape[0] // ranks), shard.shape[0])
        else:
            is_first = is_first and index == 0
    start = begin * shard.shape[1:].numel()
    return Run(shard.shape, start, shard.to_local().detach().flatten()), is_first


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
def take_shard(tensor: Tensor, whole: Tensor) -> None:
    """Set a tensor, or this rank's shard of it, to a whole value or its part; nothing is sent."""
    if isinstance(tensor, DTensor):
        tensor.to_local().copy_(shard_of(whole, tensor))
    else:
        tensor.copy_(whole)


@torch.no_grad()
def take_stored(tensor: Tensor, stored: Stored) -> None:
    """Set a tensor, or this rank's shard of it, from a checkpoint; only that is read."""
    if isinstance(tensor, DTensor):
        run, _ = run_of(tensor)
        local = tensor.to_local()
        local.copy_(stored.run(run.start, run.stop).view(local.shape))
    else:
        tensor.copy_(stored.whole())


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
