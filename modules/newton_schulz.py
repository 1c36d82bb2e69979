"""Muon's orthogonalisation of matrices, whole ones and ones that ranks hold stretches of.

A matrix that is cut is put together on one of its ranks, in bf16, and its result goes back the same
way: over a matrix's ranks it moves twice, and each rank has one share of the work.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from modules.stretches import Layout

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients a, b, c of Muon's quintic iteration, chosen there for a steep slope at zero."""

NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ_EPSILON = 1e-7

LARGEST_BATCH = 2**26
"""Elements that a rank orthogonalises at once, unless one matrix has more: 128 MiB a copy."""


def deal(layouts: Sequence[Layout], rank: int) -> Iterator[tuple[list[int], list[int] | None]]:
    """Deal matrices to ranks in batches of at most `LARGEST_BATCH` elements a rank.

    Args:
        layouts: Of the same matrices, in the same order, on every rank.
        rank: This one.

    Yields:
        Indices of matrices, and the rank by which each is to be orthogonalised. First, without
        ranks, those that are whole here; then, the same on every rank, those that are cut.
    """
    order = sorted(range(len(layouts)), key=lambda i: layouts[i].shape)
    holders = {i: layouts[i].holders for i in order}
    whole = [(i, rank) for i in order if holders[i] == [rank]]
    cut = [i for i in order if len(holders[i]) > 1]
    # In turns: ranks get as many of each shape, but for one.
    dealt = [(i, holders[i][turn % len(holders[i])]) for turn, i in enumerate(cut)]
    for batch in _batches(layouts, whole):
        yield [i for i, _ in batch], None
    for batch in _batches(layouts, dealt):
        yield [i for i, _ in batch], [owner for _, owner in batch]


def _batches(
    layouts: Sequence[Layout], dealt: Sequence[tuple[int, int]]
) -> Iterator[list[tuple[int, int]]]:
    batch: list[tuple[int, int]] = []
    load: dict[int, int] = defaultdict(int)
    for index, owner in dealt:
        numel = math.prod(layouts[index].shape)
        if load[owner] and load[owner] + numel > LARGEST_BATCH:
            yield batch
            batch, load = [], defaultdict(int)
        batch.append((index, owner))
        load[owner] += numel
    if batch:
        yield batch


def orthogonalise_stretches(
    updates: Sequence[Tensor],
    layouts: Sequence[Layout],
    owners: Sequence[int] | None,
    group: dist.ProcessGroup | None,
) -> list[Tensor]:
    """Orthogonalise matrices of which this rank has stretches.

    Args:
        updates: This rank's stretches, [elements] each, or whole matrices; bf16.
        layouts: Of the matrices.
        owners: Rank of the group that orthogonalises each; None: this one, which has them whole.
        group: Ranks that share them.

    Returns:
        This rank's stretches of the results.
    """
    if owners is None:
        whole = [u.reshape(layout.shape) for u, layout in zip(updates, layouts, strict=True)]
        return [result.reshape(-1) for result in orthogonalise_by_shape(whole)]
    ranks, mine = range(dist.get_world_size(group)), dist.get_rank(group)
    by_owner = sorted(range(len(updates)), key=lambda i: owners[i])
    out = [sum(u.numel() for u, o in zip(updates, owners, strict=True) if o == r) for r in ranks]
    owned = [layout for layout, owner in zip(layouts, owners, strict=True) if owner == mine]
    into = [sum(layout.numel(rank) for layout in owned) for rank in ranks]

    received = updates[0].new_empty(sum(into))
    dist.all_to_all_single(received, torch.cat([updates[i] for i in by_owner]), into, out, group)
    # By rank, and of each rank by matrix.
    parts = received.split([layout.numel(rank) for rank in ranks for layout in owned] or 1)
    whole = [torch.cat(parts[i :: len(owned)]).view(m.shape) for i, m in enumerate(owned)]
    results = [result.reshape(-1) for result in orthogonalise_by_shape(whole)]
    sent = [r[slice(*m.stretches[k])] for k in ranks for r, m in zip(results, owned, strict=True)]

    returned = updates[0].new_empty(sum(out))
    dist.all_to_all_single(returned, torch.cat([received[:0], *sent]), out, into, group)
    split = returned.split([updates[i].numel() for i in by_owner])
    back = dict(zip(by_owner, split, strict=True))
    return [back[i] for i in range(len(updates))]


def orthogonalise_by_shape(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Orthogonalise matrices of any shapes, those of one shape as one batch."""
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for i, matrix in enumerate(matrices):
        by_shape[matrix.shape].append(i)
    results: dict[int, Tensor] = {}
    for same in by_shape.values():
        results |= zip(same, orthogonalise(torch.stack([matrices[i] for i in same])), strict=True)
    return [results[i] for i in range(len(matrices))]


def orthogonalise(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices near 1, keeping their singular vectors.

    Five steps of the quintic Newton-Schulz iteration X <- aX + (bA + cA^2)X with A = X X^T, in
    bf16, from X scaled to Frobenius norm 1; it ends within about 0.7 to 1.2, not at 1.

    Args:
        matrices: [count, rows, columns].

    Returns:
        bf16, of the same shape.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    is_tall = x.size(1) > x.size(2)
    if is_tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=NEWTON_SCHULZ_EPSILON)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
