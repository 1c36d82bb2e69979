"""Muon for the matrices of hidden layers, AdamW for everything else, as one optimizer.

Muon works on whole matrices. Where ranks hold stretches of them, everything elementwise happens on
the stretches, and each matrix is put together on one rank for its Newton-Schulz iteration alone.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adamw import adamw

from modules.newton_schulz import deal, orthogonalise_stretches
from modules.stretches import Stretch, StretchOptimizer, local

ParameterRoles = Mapping[str, Sequence[Parameter]]
"""Parameters by what they are to an optimizer.

`matrix`: weight matrices of hidden layers; `embedding`: tables of tokens that are only looked up;
`head`: output projections, tied tables among them; `other`: gains, biases, positions.
"""


class MuonAdamW(StretchOptimizer):
    """Muon for the matrices of hidden layers and AdamW for the rest, as one optimizer.

    Muon: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. The steps are those of
    `torch.optim.Muon` (its `original` rate, lr * sqrt(max(1, rows / columns))) and of fused
    `torch.optim.AdamW`; the difference is that matrices of one shape go through the
    Newton-Schulz iteration as one batch: eight of [128, 128] in 4.6 ms instead of 8.8 on one
    core. One optimizer means one schedule, one state dict of plain tensors, and one count of steps.

    Matrices that are sharded go to one of their ranks in bf16 each, are orthogonalised there as on
    one rank, and their stretches go back.

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

    name = "muon"

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
        super().__init__(groups)

    def needs_whole(self, group: Mapping[str, Any]) -> bool:
        """The matrices; AdamW works on the elements of a flat tensor."""
        return group["kind"] == "muon"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, whose matrices must be 2-D; the parent's constructor comes through here."""
        super().add_param_group(param_group)
        self._check_matrices()

    def _check_matrices(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["kind"] == "muon":
                    self.held(parameter, is_matrix=True)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As its parent; sharded engines may have swapped the parameters since construction."""
        self._check_matrices()
        return super().step(closure)

    def step_group(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Update matrices by Muon or everything else by AdamW."""
        if group["kind"] == "adamw":
            self._step_adamw(group, parameters)
            return
        tensors = {parameter: self._accumulate(group, parameter) for parameter in parameters}
        for held, stretches in self.by_group(tensors, is_matrix=True):
            layouts = [stretch.layout for stretch in stretches]
            for batch, owners in deal(layouts, held.rank):
                updates = []
                for _, gradient, buffer in (stretches[i].views for i in batch):
                    update = gradient.lerp(buffer, group["momentum"])
                    updates.append(update.to(held.device, torch.bfloat16))
                results = orthogonalise_stretches(
                    updates, [layouts[i] for i in batch], owners, held.group
                )
                for i, result in zip(batch, results, strict=True):
                    self._apply(group, stretches[i], result)

    def _accumulate(self, group: dict[str, Any], parameter: Tensor) -> Sequence[Tensor]:
        """Fold the gradient into the momentum; give this rank's parameter, gradient, momentum."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
        gradient = local(cast(Tensor, parameter.grad))
        buffer = local(state["momentum_buffer"])
        found_inf = self.found_inf_on(gradient.device)
        if found_inf is not None:
            gradient = torch.where(found_inf != 0, buffer, gradient)  # which leaves the momentum
        buffer.lerp_(gradient, 1 - group["momentum"])
        return local(parameter), gradient, buffer

    def _apply(self, group: dict[str, Any], stretch: Stretch, update: Tensor) -> None:
        rows, columns = stretch.layout.shape
        lr, parameter = group["lr"], stretch.views[0]
        update = update.view(parameter.shape).to(parameter.device)
        decay, rate = 1 - lr * group["weight_decay"], lr * max(1, rows / columns) ** 0.5
        found_inf = self.found_inf_on(parameter.device)
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
            [local(parameter) for parameter in parameters],
            [local(cast(Tensor, parameter.grad)) for parameter in parameters],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            found_inf=self.found_inf_on(parameters[0].device),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )
