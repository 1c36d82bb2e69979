"""Where DeepSpeed keeps a parameter's fp32 master and optimizer state, on this rank.

Stages 1 and 2 cut a group's parameters, laid end to end, into one piece per rank; stage 3 cuts
every parameter into one piece per rank. Either way a rank has at most one run of a parameter's
elements, inside a flat tensor that the optimizer steps on.
"""

import copy
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trainers.stored_tensors import Run, Stored


@dataclass(frozen=True)
class ShardedParameter:
    """A parameter and this rank's run of its elements.

    Attributes:
        parameter: The module's.
        shape: Of the whole parameter.
        device: Where the whole is put together.
        flat: fp32 tensor of the optimizer that holds the run, or would.
        flat_start: Where the run begins in `flat`.
        start: Where the run begins in the flattened parameter.
        numel: Length of the run; 0 where this rank has none of the parameter.
        optimizer: DeepSpeed's copy, whose state belongs to `flat`.
        group: The ranks that share the parameter.
    """

    parameter: Tensor
    shape: torch.Size
    device: torch.device
    flat: Tensor
    flat_start: int
    start: int
    numel: int
    optimizer: torch.optim.Optimizer
    group: Any

    def get(self) -> Tensor:
        """Put the whole master together on every rank; fp32."""
        whole = torch.zeros(self.shape.numel(), dtype=torch.float32, device=self.device)
        if self.numel:
            whole[self.start : self.start + self.numel] = self._run(self.flat)
        torch.distributed.all_reduce(whole, group=self.group)
        return whole.view(self.shape)

    def held(self, key: str | None = None) -> Run:
        """This rank's run of the master, or of its optimizer state `key`; a view."""
        return Run(self.shape, self.start, self._run(self._holder(key)))

    def take(self, stored: Stored, key: str | None = None) -> None:
        """Set this rank's run of the master or of an optimizer state; nothing is exchanged."""
        if self.numel:
            run = stored.run(self.start, self.start + self.numel)
            self._run(self._holder(key)).copy_(run)

    def state_keys(self) -> list[str]:
        """Names of the state that has a value per element; the same on every rank."""
        state = self.optimizer.state.get(self.flat, {})
        return sorted(key for key, value in state.items() if self._is_sharded(value))

    def unsharded(self) -> dict[str, Any]:
        """State that every rank has whole, such as the count of steps.

        A scalar is the flat tensor's; a tensor, such as a factor of second moments, the
        parameter's, by which the optimizer remembers it beside those of the flat tensor's others.
        """
        state = self.optimizer.state.get(self.flat, {})
        own = self.optimizer.state.get(self.parameter, {})
        return {key: value for key, value in state.items() if not self._is_sharded(value)} | own

    def set_state(self, key: str, value: Any) -> None:
        """Take back one entry of `state_keys` or `unsharded`."""
        state = self.optimizer.state[self.flat]
        if isinstance(value, Stored):
            if key not in state:
                state[key] = torch.zeros_like(self.flat, requires_grad=False)
            self.take(value, key)
        elif isinstance(value, Tensor) and value.ndim:
            own = self.optimizer.state[self.parameter]
            own[key] = value.to(self.flat.device, copy=True)
        elif isinstance(value, Tensor):
            on_device = any(group.get("fused") for group in self.optimizer.param_groups)
            state[key] = value.to(self.flat.device if on_device else "cpu", copy=True)
        else:
            state[key] = value

    def _is_sharded(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim > 0 and value.shape == self.flat.shape

    def _holder(self, key: str | None) -> Tensor:
        return self.flat if key is None else self.optimizer.state[self.flat][key]

    def _run(self, holder: Tensor) -> Tensor:
        return holder.detach()[self.flat_start : self.flat_start + self.numel]


def find_shards(engine: Any) -> dict[Tensor, ShardedParameter]:
    """Find this rank's run of every parameter that an engine trains."""
    zero = engine.optimizer
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        groups = zero.fp16_groups
        return {parameter: _of_stage_3(zero, parameter) for group in groups for parameter in group}
    if hasattr(zero, "fp32_groups_flat_partition"):  # stage 1 in bf16 is a class of its own
        groups, flats = zero.bf16_groups, zero.fp32_groups_flat_partition
    else:
        groups, flats = zero.bit16_groups, zero.single_partition_of_fp32_groups
    return {
        parameter: _of_stage_2(zero, parameter, flat)
        for group, flat in zip(groups, flats, strict=True)
        for parameter in group
    }


def _of_stage_2(zero: Any, parameter: Any, flat: Tensor) -> ShardedParameter:
    mapping = parameter._hp_mapping
    mine, within = (0, 0), 0
    if mapping is not None:
        address = mapping.lp_fragment_address
        mine, within = (address.start, address.numel), mapping.hp_fragment_address.start
    return ShardedParameter(
        parameter=parameter,
        shape=parameter.shape,
        device=parameter.device,
        flat=flat,
        flat_start=within,
        start=mine[0],
        numel=mine[1],
        optimizer=zero.optimizer,
        group=parameter._dp_group,
    )


def _of_stage_3(zero: Any, parameter: Any) -> ShardedParameter:
    index, within, length = zero.grad_position[zero.get_param_id(parameter)]
    start = torch.distributed.get_rank(parameter.ds_process_group) * length
    return ShardedParameter(
        parameter=parameter,
        shape=parameter.ds_shape,
        device=parameter.device,
        flat=zero.fp32_partitioned_groups_flat[index],
        flat_start=within,
        start=start,
        numel=max(0, min(length, parameter.ds_numel - start)),  # the last shards are padded
        optimizer=zero.optimizer,
        group=parameter.ds_process_group,
    )


def run_of_frozen(parameter: Any) -> Run:
    """This rank's run of a parameter that stage 3 has cut and nothing trains."""
    piece = parameter.ds_tensor
    start = torch.distributed.get_rank(parameter.ds_process_group) * piece.numel()
    count = max(0, min(piece.numel(), parameter.ds_numel - start))
    return Run(parameter.ds_shape, start, piece.detach().flatten()[:count].float())


def refresh(engine: Any) -> None:
    """Bring the parameters that the model computes with up to date with the masters."""
    zero = engine.optimizer
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        zero.update_lp_params()
        return
    zero._partition_all_parameters()
    for index in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(index)
    if zero.persistent_parameters:  # small ones, which every rank keeps whole
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def trained_copy(optimizer: Optimizer) -> Optimizer:
    """The same optimizer on the trained of its parameters, with groups and state of its own."""
    inner = copy.copy(optimizer)
    trained = [[p for p in group["params"] if p.requires_grad] for group in optimizer.param_groups]
    groups = zip(optimizer.param_groups, trained, strict=True)
    inner.param_groups = [{**group, "params": own} for group, own in groups if own]
    inner.state = defaultdict(dict)
    return inner
