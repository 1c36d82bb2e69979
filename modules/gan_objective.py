"""What a GAN minimises in the phases of a round: adversarial losses, penalties of a gradient."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modules import gan_losses
from modules.gan_average import Purpose
from modules.ramps import Ramp

PENALTIES = ("r1", "r2", "gradient")


@dataclass(frozen=True)
class Judged:
    """Images [B, C, H, W] and the discriminator's logits of them, fp32 [B]."""

    images: Tensor
    logits: Tensor


class Objective:
    """Losses of the phases of a round, each by image and in fp32; equations in `gan_losses`.

        discriminator    L_D(D(x), D(G(z))) + gamma_1/2 |grad D(x)|^2 + gamma_2/2 |grad D(G(z))|^2
                         + lambda (|grad D(m)| - 1)^2,  m between x and G(z)
        penalty          the last three times `every_steps`, where they are lazy
        generator        L_G(D(G(z)), D(x))

    Args:
        loss: `name`, one of `gan_losses.LOSSES`; `generator_every`, updates of the discriminator to
            one of the generator; `one_noise`, whether both phases of a round see the same fakes.
        penalty: `r1` and `r2` (gamma_1 and gamma_2) and `gradient` (lambda), each as `Ramp`; and
            `every_steps`: above 1 they are an update of their own, every so many rounds.
        max_images: Of the run.

    Raises:
        ValueError: A setting is unknown or impossible.
    """

    def __init__(self, loss: Mapping[str, Any], penalty: Mapping[str, Any], *, max_images: int):
        self.name: str = loss["name"]
        gan_losses.check_loss(self.name)
        self.generator_every: int = loss["generator_every"]
        self.every_steps: int = penalty["every_steps"]
        counts = {"loss.generator_every": loss, "penalty.every_steps": penalty}
        for key, settings in counts.items():
            value = settings[key.split(".")[1]]
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"module.{key}={value} -> it is a number of rounds -> 1 or more")
        self.one_noise: bool = loss["one_noise"]
        if not isinstance(self.one_noise, bool):
            raise ValueError(
                f"module.loss.one_noise={self.one_noise} -> yes or no -> true or false"
            )
        self.weights = {
            name: Ramp(penalty[name], key=f"module.penalty.{name}", max_images=max_images)
            for name in PENALTIES
        }
        self.penalised = [name for name, ramp in self.weights.items() if not ramp.is_zero]

    @property
    def penalises(self) -> bool:
        """Whether the discriminator's gradient is penalised, and so differentiated twice."""
        return bool(self.penalised)

    @property
    def penalises_fakes(self) -> bool:
        """Whether penalties take images of the generator."""
        return self.penalised != ["r1"]

    @property
    def is_lazy(self) -> bool:
        """Whether penalties are an update of their own."""
        return self.penalises and self.every_steps > 1

    @property
    def lazy_steps(self) -> int | None:
        """Rounds from one such update to the next; None where there are none."""
        return self.every_steps if self.is_lazy else None

    @property
    def pairs(self) -> bool:
        """Whether the generator's loss needs the logits of real images."""
        return self.name in gan_losses.NEEDS_REAL

    def margin(self, real: Tensor, fake: Tensor) -> Tensor:
        """How sure the discriminator is [B] of real images, by the logits [B] of both kinds.

        The logit, where the loss pushes that away from 0; of least squares, whose targets are 1
        and 0, what is beyond their middle; where only differences count, the difference.
        """
        if self.name == "least_squares":
            return real - 0.5
        return real - fake if self.pairs or self.name == "wasserstein" else real

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """Adversarial loss of the discriminator [B] by the logits [B] of both kinds."""
        return gan_losses.discriminator_loss(self.name, real, fake)

    def generator(self, fake: Tensor, real: Tensor | None) -> Tensor:
        """Loss of the generator [B] by the logits [B]; `real` where `pairs`."""
        return gan_losses.generator_loss(self.name, fake, real)

    def penalty(self, images_seen: int, judged: Mapping[str, Judged]) -> Tensor:
        """Sum of the penalties [B], not yet times `every_steps`.

        Args:
            images_seen: Before this round; weights may change with it.
            judged: For each of `penalised`, images that require gradients: `r1` of the data, `r2`
                of the generator, `gradient` between the two.
        """
        terms = []
        for name in self.penalised:
            weight, each = self.weights[name](images_seen), judged[name]
            if name == "gradient":
                value = weight * gan_losses.gradient_norm_penalty(each.logits, each.images)
            else:
                value = weight / 2 * gan_losses.squared_gradient(each.logits, each.images)
            # Of every parameter there is a gradient, perhaps of 0: ranks exchange all of them.
            terms.append(value + 0 * each.logits)
        return torch.stack(terms).sum(0)


def judge_penalised(
    names: Sequence[str],
    judge: Callable[[Tensor, Purpose], Tensor],
    *,
    known: Mapping[str, Judged],
    real: Tensor,
    fakes: Tensor | None,
    keys: Tensor,
) -> dict[str, Judged]:
    """Judge the images that penalties take, in a way that gradients reach them.

    Args:
        names: Of the penalties.
        judge: Gives logits [B] of images [B, C, H, W], for a purpose of draws.
        known: What is judged already, by name.
        real: Images of the data [B, C, H, W].
        fakes: Of the generator, likewise; None where no penalty takes them.
        keys: int64 [B], of the draws between the two.
    """
    kinds = {"r1": (real, Purpose.REAL), "r2": (fakes, Purpose.FAKE)}
    if "gradient" in names and fakes is not None:
        mixed = gan_losses.interpolate(real, fakes, keys, Purpose.INTERPOLATION)
        kinds["gradient"] = (mixed, Purpose.MIXED)
    judged = {}
    for name in names:
        if name in known:
            judged[name] = known[name]
            continue
        images, purpose = kinds[name]
        assert images is not None
        images = images.detach().float().requires_grad_()
        judged[name] = Judged(images, judge(images, purpose))
    return judged
