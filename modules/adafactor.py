"""Adafactor: second moments of a matrix by its rows and columns."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from modules.stretches import Held, Stretch, StretchOptimizer, add_up, mean_squares

LARGEST_BATCH = 2**26
"""Elements of updates, or of what ranks exchange, that a rank holds at once: 256 MiB."""


class Adafactor(StretchOptimizer):
    """Adafactor without a first moment: Shazeer and Stern 2018, arXiv 1804.04235, algorithms 4, 5.

    Of a matrix G of gradients it remembers means of squares by row, R, and by column, C, and takes
    R C / mean(R) for the second moments; of tensors of other than two dimensions it remembers all.
    With beta = 1 - step^-decay_exponent (section 7.2) and eps added to the squares,

        U = G / sqrt(R C / mean(R)),    X <- X - rate * U / max(1, RMS(U) / clip_rms)

    where rate is lr, times max(min_rms, RMS(X)) under `scale_by_rms` (section 8). The learning rate
    is the schedule's; the paper's own is `inverse_sqrt` with a constant beginning. Weight decay,
    which the paper has not, is lr * weight_decay, decoupled and not scaled, as in
    `torch.optim.Adafactor`.

    Where ranks hold stretches of a tensor, sums over it are added up over them; R and C are whole
    on each.

    Args:
        groups: `params` and `weight_decay`.
        lr: Learning rate, relative under `scale_by_rms`.
        decay_exponent: 0.8 in the paper.
        clip_rms: d, the largest root mean square of an update.
        eps: Added to squares of gradients; epsilon 1.
        scale_by_rms: Whether to scale rates by the root mean square of the tensor.
        min_rms: The smallest to scale by; epsilon 2.

    Raises:
        ValueError: A parameter is a DTensor cut otherwise than by rows.
    """

    name = "adafactor"

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        lr: float,
        decay_exponent: float,
        clip_rms: float,
        eps: float,
        scale_by_rms: bool,
        min_rms: float,
    ):
        settings = {
            "lr": lr,
            "decay_exponent": decay_exponent,
            "clip_rms": clip_rms,
            "eps": eps,
            "scale_by_rms": scale_by_rms,
            "min_rms": min_rms,
            "fused": True,  # read by torch: it then loads `step` onto the device of the parameters
        }
        super().__init__([{**g, **settings, "is_factored": f} for g, f in _by_dimensions(groups)])

    def step_group(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """As its parent."""
        is_factored = group["is_factored"]
        tensors = {parameter: self._tensors(group, parameter) for parameter in parameters}
        for held, stretches in self.by_group(tensors, is_matrix=is_factored):
            for batch in _batches(stretches, held, is_factored):
                self._step_batch(group, held, batch)

    def _tensors(self, group: dict[str, Any], parameter: Tensor) -> list[Tensor]:
        """Count the step; give the parameter, its gradient, and all second moments if kept."""
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            if not group["is_factored"]:
                state["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False)
        state["step"].add_(self.taken_on(parameter.device))
        tensors = [parameter, cast(Tensor, parameter.grad)]
        return tensors if group["is_factored"] else [*tensors, state["exp_avg_sq"]]

    def _step_batch(self, group: dict[str, Any], held: Held, batch: list[Stretch]) -> None:
        weights, is_factored = [stretch.views[0] for stretch in batch], group["is_factored"]
        sums = [each for s in batch for each in _sums(s)] if is_factored else []
        squares, *sums = add_up([mean_squares(weights, batch), *sums], held)
        updates = [
            self._factored_update(group, stretch, *sums[2 * i : 2 * i + 2])
            if is_factored
            else self._update(group, stretch)
            for i, stretch in enumerate(batch)
        ]
        [update_squares] = add_up([mean_squares(updates, batch)], held)
        rates = group["lr"] / (update_squares.sqrt() / group["clip_rms"]).clamp(min=1.0)
        if group["scale_by_rms"]:
            rates *= squares.sqrt().clamp(min=group["min_rms"])
        decay = group["lr"] * group["weight_decay"] * self.taken_on(rates.device)
        for weight, update, rate in zip(weights, updates, rates, strict=True):
            if group["weight_decay"]:
                weight.mul_(1 - decay)
            weight.sub_(self._unless_found_inf(update.mul_(rate)))

    def _weight(self, group: dict[str, Any], stretch: Stretch) -> Tensor:
        """1 - beta, or 0 where the step is not to be taken."""
        step = self.state[stretch.holder]["step"].clamp(min=1)
        return step.pow(-group["decay_exponent"]) * self.taken_on(step.device)

    def _unless_found_inf(self, tensor: Tensor) -> Tensor:
        """Make a tensor zeros, whatever it is, where the step is not to be taken."""
        found_inf = self.found_inf_on(tensor.device)
        return tensor if found_inf is None else tensor.masked_fill_(found_inf != 0, 0)

    def _update(self, group: dict[str, Any], stretch: Stretch) -> Tensor:
        """Fold squares into the second moments; give U, of this rank's stretch."""
        _, gradient, exp_avg_sq = stretch.views
        squares = self._unless_found_inf(gradient.square().add_(group["eps"]))
        exp_avg_sq.lerp_(squares, self._weight(group, stretch))
        return torch.rsqrt(exp_avg_sq, out=squares).mul_(gradient)

    def _factored_update(
        self, group: dict[str, Any], stretch: Stretch, by_row: Tensor, by_column: Tensor
    ) -> Tensor:
        """Fold sums of squares into R and C; give U, of this rank's stretch."""
        rows, columns = stretch.layout.shape
        state = self.state[stretch.layout.key]
        weight = self._weight(group, stretch)
        for key, sums, count in (("row", by_row, columns), ("column", by_column, rows)):
            means = self._unless_found_inf(sums.div(count).add_(group["eps"]))
            key = f"exp_avg_sq_{key}"
            if key not in state:
                state[key] = torch.zeros_like(means)
            state[key].lerp_(means, weight)
        row, column = state["exp_avg_sq_row"], state["exp_avg_sq_column"]
        mine, before, _ = _rows(stretch)
        factors = (row / row.mean())[mine].rsqrt()[:, None] * column.rsqrt()
        gradient = stretch.views[1]
        factors = factors.view(-1)[before : before + gradient.numel()]
        return factors.view(gradient.shape).mul_(gradient)


def _by_dimensions(groups: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], bool]]:
    """Divide groups into matrices and all else."""
    for group in groups:
        for is_factored in (True, False):
            if own := [p for p in group["params"] if (p.ndim == 2) == is_factored]:
                yield {**group, "params": own}, is_factored


def _batches(
    stretches: Sequence[Stretch], held: Held, is_factored: bool
) -> Iterator[list[Stretch]]:
    """Cut into batches of at most `LARGEST_BATCH` elements; the same on every rank."""
    num_ranks = 1 if held.group is None else dist.get_world_size(held.group)
    batch: list[Stretch] = []
    loads, exchanged = [0] * num_ranks, 0
    for stretch in stretches:
        layout = stretch.layout
        loads = [load + layout.numel(rank) for rank, load in enumerate(loads)]
        exchanged += num_ranks * sum(layout.shape) * is_factored
        if batch and max(*loads, exchanged) > LARGEST_BATCH:
            yield batch
            batch = []
            loads = [layout.numel(rank) for rank in range(num_ranks)]
            exchanged = num_ranks * sum(layout.shape) * is_factored
        batch.append(stretch)
    if batch:
        yield batch


def _rows(stretch: Stretch) -> tuple[slice, int, int]:
    """Rows that a stretch touches, and how many of their elements lie before and after it."""
    columns, stop = stretch.layout.shape[1], stretch.start + stretch.views[0].numel()
    first, end = stretch.start // columns, math.ceil(stop / columns)
    if stop == stretch.start:
        return slice(first, first), 0, 0
    return slice(first, end), stretch.start - first * columns, end * columns - stop


def _sums(stretch: Stretch) -> tuple[Tensor, Tensor]:
    """Sums of the squares of this rank's gradients, for each row and each column of the matrix."""
    rows, columns = stretch.layout.shape
    mine, before, after = _rows(stretch)
    squares = stretch.views[1].square()
    if before or after:
        squares = pad(squares, (before, after))
    squares = squares.reshape(-1, columns)
    by_row = squares.new_zeros(rows)
    by_row[mine] = squares.sum(1)
    return by_row, squares.sum(0)
