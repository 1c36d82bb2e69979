"""Where the matrices of an optimizer that needs them whole lie in DeepSpeed's flat tensors."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trainers.strategies.zero_shards import ShardedParameter, find_shards


def lay_out(engine: Any, optimizer: Optimizer) -> None:
    """Tell the engine's optimizer which stretches of matrices its flat tensors hold; collective.

    Does nothing for optimizers that have no `lay_out`. One that has it does not work elementwise on
    its groups of kind `muon`.

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
        for parameter in trained if group["kind"] == "muon" else []:
            by_flat[shards[parameter].flat].append(shards[parameter])
    for flat, matrices in by_flat.items():
        peers = matrices[0].group
        mine = [(m.start, m.start + m.numel) if m.numel else None for m in matrices]
        of_ranks: list[Any] = [None] * torch.distributed.get_world_size(peers)
        torch.distributed.all_gather_object(of_ranks, mine, group=peers)
        inner.lay_out(
            flat,
            [
                {
                    "shape": tuple(matrix.shape),
                    "stretches": _ascending([stretches[i] for stretches in of_ranks]),
                    "offset": matrix.flat_start if matrix.numel else 0,
                }
                for i, matrix in enumerate(matrices)
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
