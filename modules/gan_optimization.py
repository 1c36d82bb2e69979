"""Optimizers of a GAN's two networks, and their rates as functions of the images seen."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from modules.gan_losses import lazy_rates
from modules.ramps import Ramp

OPTIMIZERS = ("adam", "sgd")
_BELOW_1 = 0.99999  # moments that never forget begin with 0 / 0


class Rates:
    """What optimizers are made of, and what they are set to before each round.

    Args:
        name: `adam` (Kingma and Ba 2014, arXiv 1412.6980) or `sgd`.
        lr: Of the generator, and of the discriminator unless it has its own; as `Ramp`.
        discriminator_lr: None: as `lr`.
        adam: `beta1`, decay of first moments; `beta2`, of second moments, as `Ramp`; `eps`.
        sgd: `momentum`.
        lazy_steps: Rounds from one update by penalties alone to the next, for whose number the
            discriminator's rates are adjusted (`gan_losses.lazy_rates`); None: there are none.
        max_images: Of the run.

    Raises:
        ValueError: A setting is unknown or impossible.
    """

    def __init__(
        self,
        *,
        name: str,
        lr: Any,
        discriminator_lr: Any,
        adam: Mapping[str, Any],
        sgd: Mapping[str, Any],
        lazy_steps: int | None,
        max_images: int,
    ):
        if name not in OPTIMIZERS:
            raise ValueError(
                f"module.optimizer.name={name} -> not for networks of convolutions that take turns "
                f"-> choose one of {', '.join(OPTIMIZERS)}"
            )
        shares = {"adam.beta1": adam["beta1"], "sgd.momentum": sgd["momentum"]}
        for key, value in shares.items():
            if not 0 <= value < 1:
                raise ValueError(f"module.optimizer.{key}={value} -> a share -> 0 to below 1")
        if not adam["eps"] > 0:
            raise ValueError(
                f"module.optimizer.adam.eps={adam['eps']} -> it is divided by -> above 0"
            )
        self.name, self.beta1, self.eps = name, adam["beta1"], adam["eps"]
        self.momentum = sgd["momentum"]
        settings = {
            "generator": ("lr", lr),
            "discriminator": ("discriminator_lr", discriminator_lr),
        }
        if discriminator_lr is None:
            settings["discriminator"] = ("lr", lr)
        self.lr = {
            part: Ramp(value, key=f"module.optimizer.{key}", max_images=max_images)
            for part, (key, value) in settings.items()
        }
        key = "module.optimizer.adam.beta2"
        self.beta2 = Ramp(adam["beta2"], key, max_images, bounds=(0, _BELOW_1))
        self.lazy_steps = lazy_steps

    def build(self, part: str, parameters: Iterator[nn.Parameter]) -> Optimizer:
        """Make the optimizer of a part, fused, so that a step can be called off on the device."""
        lr, betas = self.at(part, 0)
        if self.name == "sgd":
            return torch.optim.SGD(parameters, lr=lr, momentum=self.momentum, fused=True)
        return torch.optim.Adam(parameters, lr=lr, betas=betas, eps=self.eps, fused=True)

    def at(self, part: str, images: int) -> tuple[float, tuple[float, float]]:
        """Learning rate and betas of a part after `images` images."""
        lr, betas = self.lr[part](images), (self.beta1, self.beta2(images))
        if part == "discriminator" and self.lazy_steps is not None:
            return lazy_rates(lr, betas, self.lazy_steps)
        return lr, betas

    def set(self, optimizers: Mapping[str, Any], images: int) -> None:
        """Give each part's optimizer what it has after `images` images."""
        for part, optimizer in optimizers.items():
            lr, betas = self.at(part, images)
            for group in optimizer.param_groups:
                group["lr"] = lr
                if "betas" in group:
                    group["betas"] = betas
