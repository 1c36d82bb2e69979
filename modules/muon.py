"""Muon for the matrices of hidden layers, AdamW for everything else, as one optimizer.

Muon works on whole matrices. Where ranks hold stretches of them, everything elementwise happens on
the stretches, and each matrix is put together on one rank for its Newton-Schulz iteration alone.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim.adamw import adamw

from modules.newton_schulz import Held, Layout, deal, held_by_dtensor, orthogonalise_stretches

ParameterRoles = Mapping[str, Sequence[Parameter]]
"""Parameters by what they are to an optimizer.

`matrix`: weight matrices of hidden layers; `embedding`: tables of tokens that are only looked up;
`head`: output projections, tied tables among them; `other`: gains, biases, positions.
"""


class _Stretch(NamedTuple):
    """This rank's stretch of a matrix: views of [elements], or of the whole matrix."""

    layout: Layout
    parameter: Tensor
    gradient: Tensor
    buffer: Tensor


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the matrices of hidden layers and AdamW for the rest, as one optimizer.

    Muon: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. The steps are those of
    `torch.optim.Muon` (its `original` rate, lr * sqrt(max(1, rows / columns))) and of fused
    `torch.optim.AdamW`; the difference is that matrices of one shape go through the
    Newton-Schulz iteration as one batch: eight of [128, 128] in 4.6 ms instead of 8.8 on one
    core. One optimizer means one schedule, one state dict of plain tensors, and one count of steps.

    Matrices may be sharded: by FSDP2, as DTensors cut by rows, or by whoever tells by `lay_out`
    where they lie in a flat tensor. Each matrix then goes to one of its ranks in bf16, is
    orthogonalised there as on one rank, and its stretches go back. State stays in shards.

    Like fused optimizers it leaves parameters and state as they are where `found_inf` is 1, without
    waiting for the device, and whatever the gradients are.

    Args:
        roles: Parameters by role.
        lr: Learning rate by role.
        momentum: Of Muon, with Nesterov's form.
        weight_decay: Decoupled, of the matrices.
        betas: Of AdamW.
        eps: Of AdamW.

    Raises:
        ValueError: A matrix is not 2-D and was not laid out, or is a DTensor cut otherwise than by
            rows; the update would be wrong without a sign.
    """

    found_inf: Tensor | None = None
    """0 or 1, one element: whether not to step; set around `step`, as for fused optimizers."""

    def __init__(
        self,
        roles: ParameterRoles,
        *,
        lr: Mapping[str, float],
        momentum: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
    ):
        # `fused` is read by torch too: it then loads `step` onto the device of the parameters.
        adamw_settings = {"kind": "adamw", "fused": True, "betas": betas, "eps": eps}
        muon_settings = {"kind": "muon", "momentum": momentum, "weight_decay": weight_decay}
        groups = [
            {"params": list(parameters), "role": role, "lr": lr[role]}
            | (muon_settings if role == "matrix" else adamw_settings)
            for role, parameters in roles.items()
            if parameters
        ]
        self._layouts: dict[Tensor, Held] = {}
        super().__init__(groups, {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of another; what it was told about flat tensors does not come along."""
        super().__setstate__(state)
        self.__dict__.setdefault("_layouts", {})

    def lay_out(
        self,
        flat: Tensor,
        matrices: Iterable[Mapping[str, Any]],
        *,
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        """Tell which stretches of which matrices a flat tensor holds.

        Args:
            flat: A tensor that the optimizer will step on, [elements].
            matrices: Fields of their `Layout`; the same on every rank but for `offset`.
            group: Ranks that share the matrices.
            device: Of a kind that the group exchanges; `flat` may be on another.
        """
        layouts = [Layout(**matrix) for matrix in matrices]
        for layout in layouts:
            ends = [0, *(end for start, stop in layout.stretches for end in (start, stop))]
            ends.append(layout.shape[0] * layout.shape[1])
            rank = dist.get_rank(group)
            assert ends == sorted(ends), f"stretches {layout.stretches} of {layout.shape} overlap"
            assert sum(layout.numel(r) for r in range(len(layout.stretches))) == ends[-1]
            assert layout.offset + layout.numel(rank) <= flat.numel()
        self._layouts[flat] = Held(layouts, group, device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, whose matrices must be 2-D; the parent's constructor comes through here."""
        super().add_param_group(param_group)
        self._check_matrices()

    def _check_matrices(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["kind"] == "muon":
                    self._held(parameter)

    def _held(self, parameter: Tensor) -> Held:
        if parameter in self._layouts:
            return self._layouts[parameter]
        if parameter.ndim != 2:
            raise ValueError(
                "module.optimizer.name=muon -> it works on whole matrices, and a "
                f"parameter of shape {tuple(parameter.shape)} is none (a strategy that "
                "flattens shards makes such, and did not lay them out) -> choose another strategy, "
                "or module.optimizer.name=adamw"
            )
        if isinstance(parameter, DTensor):
            self._layouts[parameter] = held_by_dtensor(parameter)
            return self._layouts[parameter]
        shape = parameter.shape[0], parameter.shape[1]
        whole = Layout(shape, ((0, parameter.numel()),))
        return Held([whole], None, parameter.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns the closure's value.

        Collective where matrices are sharded.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Sharded engines may swap the parameters after construction.
        self._check_matrices()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["kind"] == "muon":
                self._step_muon(group, parameters)
            elif parameters:
                self._step_adamw(group, parameters)
        return loss

    def _found_inf_on(self, device: torch.device) -> Tensor | None:
        return None if self.found_inf is None else self.found_inf.reshape(()).to(device)

    def _step_muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        by_peers: dict[Any, list[_Stretch]] = defaultdict(list)
        for parameter in parameters:
            matrices, peers, device = self._held(parameter)
            tensors = self._accumulate(group, parameter)
            for layout in matrices:
                views = tensors
                if peers is not None:
                    numel = layout.numel(dist.get_rank(peers))
                    views = [t.view(-1).narrow(0, layout.offset, numel) for t in tensors]
                by_peers[peers, device].append(_Stretch(layout, *views))
        for (peers, device), stretches in by_peers.items():
            rank = 0 if peers is None else dist.get_rank(peers)
            layouts = [stretch.layout for stretch in stretches]
            for batch, owners in deal(layouts, rank):
                updates = [
                    stretches[i].gradient.lerp(stretches[i].buffer, group["momentum"])
                    for i in batch
                ]
                updates = [update.to(device, torch.bfloat16) for update in updates]
                results = orthogonalise_stretches(
                    updates, [layouts[i] for i in batch], owners, peers
                )
                for i, result in zip(batch, results, strict=True):
                    self._apply(group, stretches[i], result)

    def _accumulate(self, group: dict[str, Any], parameter: Tensor) -> Sequence[Tensor]:
        """Fold the gradient into the momentum; give this rank's parameter, gradient, momentum."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
        gradient = _local(cast(Tensor, parameter.grad))
        buffer = _local(state["momentum_buffer"])
        found_inf = self._found_inf_on(gradient.device)
        if found_inf is not None:
            gradient = torch.where(found_inf != 0, buffer, gradient)  # which leaves the momentum
        buffer.lerp_(gradient, 1 - group["momentum"])
        return _local(parameter), gradient, buffer

    def _apply(self, group: dict[str, Any], stretch: _Stretch, update: Tensor) -> None:
        rows, columns = stretch.layout.shape
        lr, parameter = group["lr"], stretch.parameter
        update = update.view(parameter.shape).to(parameter.device)
        decay, rate = 1 - lr * group["weight_decay"], lr * max(1, rows / columns) ** 0.5
        found_inf = self._found_inf_on(parameter.device)
        if found_inf is None:
            parameter.mul_(decay).add_(update, alpha=-rate)
        else:
            stepped = parameter.mul(decay).add_(update, alpha=-rate)
            parameter.copy_(torch.where(found_inf != 0, parameter, stepped))

    def _step_adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter, requires_grad=False)
                state["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False)
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            [_local(parameter) for parameter in parameters],
            [_local(cast(Tensor, parameter.grad)) for parameter in parameters],
            [_local(state["exp_avg"]) for state in states],
            [_local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            found_inf=self._found_inf_on(parameters[0].device),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, which shares its storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
