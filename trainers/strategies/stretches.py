"""Where the tensors of an optimizer that needs them whole lie in DeepSpeed's flat tensors."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trainers.strategies.zero_shards import ShardedParameter, find_shards


def lay_out(engine: Any, optimizer: Optimizer) -> None:
    """Tell the engine's optimizer which stretches of tensors its flat tensors hold; collective.

    Does nothing for optimizers that have no `lay_out`: they work elementwise. One that has it says
    by `needs_whole` on which of its groups it does not.

    Args:
        engine: DeepSpeed's, of stage 1, 2 or 3, after `deepspeed.initialize`.
        optimizer: The module's, with the real parameters in its groups, by a copy of which the
            engine steps.
    """
    inner = engine.optimizer.optimizer
    if not hasattr(inner, "lay_out"):
        return
    shards = find_shards(engine)
    by_flat: dict[Tensor, list[ShardedParameter]] = defaultdict(list)
    for group in optimizer.param_groups:
        trained = [parameter for parameter in group["params"] if parameter in shards]
        for parameter in trained if inner.needs_whole(group) else []:
            by_flat[shards[parameter].flat].append(shards[parameter])
    for flat, tensors in by_flat.items():
        peers = tensors[0].group
        mine = [(t.start, t.start + t.numel) if t.numel else None for t in tensors]
        of_ranks: list[Any] = [None] * torch.distributed.get_world_size(peers)
        torch.distributed.all_gather_object(of_ranks, mine, group=peers)
        inner.lay_out(
            flat,
            [
                {
                    "shape": tuple(tensor.shape),
                    "stretches": _ascending([stretches[i] for stretches in of_ranks]),
                    "offset": tensor.flat_start if tensor.numel else 0,
                    "key": tensor.parameter,
                }
                for i, tensor in enumerate(tensors)
            ],
            group=peers,
            device=engine.device,
        )


def _ascending(stretches: list[tuple[int, int] | None]) -> tuple[tuple[int, int], ...]:
    """Put empty stretches of ranks without any where the ones before them end."""
    end, filled = 0, []
    for stretch in stretches:
        start, end = stretch or (end, end)
        filled.append((start, end))
    return tuple(filled)
