"""Optimizers that need whole tensors and step on what a rank holds of them.

Muon orthogonalises whole matrices; Adafactor and AdamW with RMS scaling need sums over whole
tensors. A tensor of the optimizer may be whole, a shard, or flat with stretches of many in it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


@dataclass(frozen=True)
class Layout:
    """A whole tensor, and which stretch of its elements, row by row, lies on which rank.

    Attributes:
        shape: Of the whole tensor.
        stretches: [start, stop) by rank of the group; ascending, and covering the tensor.
        key: What the optimizer's state calls the whole tensor: the parameter of the module.
        offset: Where this rank's stretch starts in the tensor that the optimizer holds.
    """

    shape: tuple[int, ...]
    stretches: tuple[tuple[int, int], ...]
    key: Tensor = field(compare=False)
    offset: int = 0

    def numel(self, rank: int) -> int:
        """Elements on a rank."""
        start, stop = self.stretches[rank]
        return stop - start

    @property
    def holders(self) -> list[int]:
        """Ranks that have any of it."""
        return [rank for rank, (start, stop) in enumerate(self.stretches) if stop > start]


class Held(NamedTuple):
    """What a tensor of the optimizer holds.

    Attributes:
        layouts: In the same order on every rank.
        group: Ranks that share them; None: they are whole.
        device: Where they are exchanged.
    """

    layouts: Sequence[Layout]
    group: dist.ProcessGroup | None
    device: torch.device

    @property
    def rank(self) -> int:
        """This one in the group."""
        return 0 if self.group is None else dist.get_rank(self.group)


class Stretch(NamedTuple):
    """This rank's stretch of a tensor, and the same of others like it.

    Attributes:
        holder: What the optimizer holds it in.
        layout: Of the whole tensor.
        start: First of its elements.
        views: [elements] each, or whole tensors of any shape.
    """

    holder: Tensor
    layout: Layout
    start: int
    views: list[Tensor]


class StretchOptimizer(torch.optim.Optimizer):
    """What optimizers that need whole tensors have in common.

    Tensors may be sharded: by FSDP2, as DTensors cut by rows, or by whoever tells by `lay_out`
    where they lie in a flat tensor. State of the size of parameters stays in shards.

    Like fused optimizers they leave parameters and state as they are where `found_inf` is 1,
    without waiting for the device, and whatever the gradients are.

    Args:
        groups: Of parameters, with all settings.
    """

    name: ClassVar[str]
    """As `module.optimizer.name=`."""

    found_inf: Tensor | None = None
    """0 or 1, one element: whether not to step; set around `step`, as for fused optimizers."""

    def __init__(self, groups: list[dict[str, Any]]):
        self._layouts: dict[Tensor, Held] = {}
        super().__init__(groups, {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of another; what it was told about flat tensors does not come along."""
        super().__setstate__(state)
        self.__dict__.setdefault("_layouts", {})

    def needs_whole(self, group: Mapping[str, Any]) -> bool:
        """Whether the tensors of a group have to be laid out where they are flattened."""
        return True

    def lay_out(
        self,
        flat: Tensor,
        tensors: Iterable[Mapping[str, Any]],
        *,
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        """Tell which stretches of which tensors a flat tensor holds.

        Args:
            flat: A tensor that the optimizer will step on, [elements].
            tensors: Fields of their `Layout`; the same on every rank but for `offset` and `key`.
            group: Ranks that share the tensors.
            device: Of a kind that the group exchanges; `flat` may be on another.
        """
        layouts = [Layout(**tensor) for tensor in tensors]
        for layout in layouts:
            ends = [0, *(end for start, stop in layout.stretches for end in (start, stop))]
            ends.append(math.prod(layout.shape))
            rank = dist.get_rank(group)
            assert ends == sorted(ends), f"stretches {layout.stretches} of {layout.shape} overlap"
            assert sum(layout.numel(r) for r in range(len(layout.stretches))) == ends[-1]
            assert layout.offset + layout.numel(rank) <= flat.numel()
        self._layouts[flat] = Held(layouts, group, device)

    def held(self, parameter: Tensor, *, is_matrix: bool) -> Held:
        """Find what a tensor of the optimizer holds.

        Raises:
            ValueError: It is no matrix where it should be one and was not laid out, or is a DTensor
                cut otherwise than by rows; the update would be wrong without a sign.
        """
        if parameter in self._layouts:
            return self._layouts[parameter]
        if is_matrix and parameter.ndim != 2:
            raise ValueError(
                f"module.optimizer.name={self.name} -> it works on whole matrices, and a "
                f"parameter of shape {tuple(parameter.shape)} is none (a strategy that "
                "flattens shards makes such, and did not lay them out) -> choose another strategy, "
                "or module.optimizer.name=adamw"
            )
        if isinstance(parameter, DTensor):
            self._layouts[parameter] = _held_by_dtensor(parameter, self.name)
            return self._layouts[parameter]
        whole = Layout(tuple(parameter.shape), ((0, parameter.numel()),), key=parameter)
        return Held([whole], None, parameter.device)

    def by_group(
        self, tensors: Mapping[Tensor, Sequence[Tensor]], *, is_matrix: bool
    ) -> Iterator[tuple[Held, list[Stretch]]]:
        """Sort this rank's stretches by the ranks that share them; the same order on every rank.

        Args:
            tensors: Parameter -> it and tensors like it (its gradient, its state), of which the
                stretches are views.
            is_matrix: Whether only matrices will do.
        """
        found: dict[Any, tuple[Held, list[Stretch]]] = {}
        for parameter, like in tensors.items():
            held = self.held(parameter, is_matrix=is_matrix)
            views = [local(tensor) for tensor in like]
            _, stretches = found.setdefault((held.group, held.device), (held, []))
            for layout in held.layouts:
                start, stop = layout.stretches[held.rank]
                own = views
                if held.group is not None:
                    own = [v.view(-1).narrow(0, layout.offset, stop - start) for v in views]
                stretches.append(Stretch(parameter, layout, start, own))
        yield from found.values()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns the closure's value.

        Collective where tensors are sharded.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if parameters := [p for p in group["params"] if p.grad is not None]:
                self.step_group(group, parameters)
        return loss

    def step_group(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Update parameters of a group, all of which have gradients."""
        raise NotImplementedError

    def found_inf_on(self, device: torch.device) -> Tensor | None:
        """`found_inf`, without dimensions."""
        return None if self.found_inf is None else self.found_inf.reshape(()).to(device)

    def taken_on(self, device: torch.device) -> Tensor | float:
        """1, or 0 where the step is not to be taken."""
        found_inf = self.found_inf_on(device)
        return 1.0 if found_inf is None else 1.0 - found_inf


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, which shares its storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def add_up(values: Sequence[Tensor], held: Held) -> list[Tensor]:
    """Add up values over the ranks that share tensors; the same bits on every rank.

    Sums are in the order of ranks and not in a collective's: copies of a model that is sharded
    within each copy have groups of their own, and must not drift apart.

    Args:
        values: fp32, of the same shapes on every rank.
        held: Says the ranks.
    """
    if held.group is None:
        return list(values)
    flat = torch.cat([value.reshape(-1) for value in values]).to(held.device)
    gathered = flat.new_empty(dist.get_world_size(held.group), flat.numel())
    dist.all_gather_into_tensor(gathered.view(-1), flat, group=held.group)
    total = gathered.sum(0).to(values[0].device)
    sums = total.split([value.numel() for value in values])
    return [each.view(value.shape) for each, value in zip(sums, values, strict=True)]


def mean_squares(tensors: Sequence[Tensor], stretches: Sequence[Stretch]) -> Tensor:
    """What this rank's stretches add to the mean squares of whole tensors.

    Args:
        tensors: Like the views of the stretches.
        stretches: Say how long the whole tensors are.

    Returns:
        [stretches]; added up over the ranks, the mean squares.
    """
    lengths = [math.prod(stretch.layout.shape) for stretch in stretches]
    norms = [
        torch.linalg.vector_norm(tensor).div(length**0.5)
        for tensor, length in zip(tensors, lengths, strict=True)
    ]
    return torch.stack(norms).square()


def _held_by_dtensor(parameter: DTensor, name: str) -> Held:
    """Find the stretch of a tensor that this rank has as a DTensor."""
    mesh, placements = parameter.device_mesh, parameter.placements
    cut = [axis for axis, placement in enumerate(placements) if not placement.is_replicate()]
    # By type: subclasses of Shard order the rows otherwise.
    is_by_rows = all(
        type(placements[axis]) is Shard and placements[axis].is_shard(0) for axis in cut
    )
    if len(cut) > 1 or not is_by_rows:
        raise ValueError(
            f"module.optimizer.name={name} -> a tensor of shape {tuple(parameter.shape)} is placed "
            f"as {placements}, and it can only be put together from rows along one axis of the "
            "mesh -> shard by rows (FSDP2's default), or choose module.optimizer.name=adamw"
        )
    shape, here = tuple(parameter.shape), parameter.to_local()
    if not cut:
        whole = Layout(shape, ((0, here.numel()),), key=parameter)
        return Held([whole], None, here.device)
    num_ranks, per_row = mesh.size(cut[0]), math.prod(shape[1:])
    share = -(-shape[0] // num_ranks)  # as torch.chunk
    ends = [min(rank * share, shape[0]) * per_row for rank in range(num_ranks + 1)]
    layout = Layout(shape, tuple(pairwise(ends)), key=parameter)
    assert layout.numel(mesh.get_local_rank(cut[0])) == here.numel()
    # Offloaded shards are on the CPU, where an NCCL group has no collectives.
    is_there = here.device.type == mesh.device_type
    device = here.device if is_there else torch.device(mesh.device_type)
    return Held([layout], mesh.get_group(cut[0]), device)
