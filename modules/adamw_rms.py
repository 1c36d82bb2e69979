"""AdamW whose learning rate is relative to the size of each tensor."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from modules.stretches import Stretch, StretchOptimizer, add_up, mean_squares


class AdamWRMS(StretchOptimizer):
    """AdamW with the rate of each tensor multiplied by max(min_rms, RMS(tensor)).

    From Adafactor's relative steps (Shazeer and Stern 2018, arXiv 1804.04235, section 8); with
    AdamW in place of factored moments it is what nanoT5 trains T5 by (Nawrot 2023, arXiv
    2309.02373). The root mean square is of the whole tensor before the step. As there, weight decay
    is lr * weight_decay, not scaled. The rest is fused `torch.optim.AdamW`, which departs from
    nanoT5 in two points: epsilon is added to the root of the bias-corrected second moment, not of
    the raw one, and decay comes before the update, not after it.

    State is that of AdamW, by the same names.

    Args:
        groups: `params` and `weight_decay`.
        lr: Relative learning rate.
        betas: Of AdamW.
        eps: Of AdamW.
        min_rms: Smallest root mean square to scale by, or tensors of zeros would stay so.

    Raises:
        ValueError: A parameter is a DTensor cut otherwise than by rows.
    """

    name = "adamw_rms"

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        min_rms: float,
    ):
        # `fused` is read by torch too: it then loads `step` onto the device of the parameters.
        settings = {"lr": lr, "betas": betas, "eps": eps, "min_rms": min_rms, "fused": True}
        super().__init__([{**group, **settings} for group in groups])

    def step_group(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """As its parent."""
        tensors = {parameter: self._tensors(parameter) for parameter in parameters}
        for held, stretches in self.by_group(tensors, is_matrix=False):
            weights = [stretch.views[0] for stretch in stretches]
            [squares] = add_up([mean_squares(weights, stretches)], held)
            rates = squares.sqrt().clamp(min=group["min_rms"]) * group["lr"]
            decay = group["lr"] * group["weight_decay"] * self.taken_on(squares.device)
            for stretch, rate in zip(stretches, rates, strict=True):
                self._step_stretch(group, stretch, rate, decay)

    def _tensors(self, parameter: Tensor) -> list[Tensor]:
        """Count the step; give the tensors that fused AdamW wants."""
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False)
        state["step"].add_(self.taken_on(parameter.device))
        gradient = cast(Tensor, parameter.grad)
        return [parameter, gradient, state["exp_avg"], state["exp_avg_sq"]]

    def _step_stretch(
        self, group: dict[str, Any], stretch: Stretch, rate: Tensor, decay: Tensor | float
    ) -> None:
        parameter, gradient, exp_avg, exp_avg_sq = stretch.views
        if not parameter.numel():
            return
        if group["weight_decay"]:
            parameter.mul_(1 - decay)
        # Below `torch.optim.adamw.adamw`, which would count a step for each stretch.
        torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
            [parameter],
            [gradient],
            [exp_avg],
            [exp_avg_sq],
            [],
            [self.state[stretch.holder]["step"]],
            lr=rate,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=0.0,
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            found_inf=self.found_inf_on(parameter.device),
        )
