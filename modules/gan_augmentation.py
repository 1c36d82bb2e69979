"""Augmentation of what a discriminator sees, real and generated, and the control of how much of it.

Legend: B images of C channels, H rows and W columns; p the probability of each operation.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modules import gan_adaptive, gan_diffaugment
from modules.gan_adaptive import adaptive
from modules.gan_diffaugment import diffaugment
from modules.ramps import Ramp

AUGMENTATIONS = ("none", "diffaugment", "adaptive")
_GROUPS = {"diffaugment": gan_diffaugment.GROUPS, "adaptive": gan_adaptive.GROUPS}
_NEEDS_COLOR = {"hue", "saturation"}  # operations that leave grey as it is
_CONTROL = {"target", "speed_images", "interval_steps"}


class Augmentation(nn.Module):
    """Changes images in ways drawn from their keys, differentiably.

    What was drawn depends on an image's key, the purpose and p alone, so that a batch may be split
    in any way. p is a number, a ramp, or controlled such that the discriminator tells real images
    by the sign of its logit no better than `target` says (Karras et al. 2020, arXiv 2006.06676,
    section 3, r_t of equation 1). Its state is in buffers, to be kept in fp32 and equal on all
    ranks.

    Args:
        name: One of `AUGMENTATIONS`.
        ops: Operations and groups of them; None: all that the images have channels for.
        probability: Under `adaptive` a number, a ramp (`modules.ramps.Ramp`), or `target`,
            `speed_images` and `interval_steps`; else None: `diffaugment` is applied to all images.
        channels: C, 1 or 3.
        max_images: Of the run.

    Attributes:
        is_active: Whether images are ever changed.
        has_target: Whether p is controlled, from what is given to `observe`.
        probability: fp32 [], p.

    Raises:
        ValueError: A name is unknown, an operation has no meaning for the images, or a probability
            is none, missing or not used.
    """

    probability: Tensor
    sign_sum: Tensor
    sign_count: Tensor

    def __init__(
        self,
        *,
        name: str,
        ops: Sequence[str] | None,
        probability: float | Mapping[str, Any] | None,
        channels: int,
        max_images: int,
    ):
        super().__init__()
        self.ops = _choose_ops(name, ops, channels)
        self._ramp, self._control = _choose_probability(name, probability, max_images)
        self.name, self.has_target = name, self._control is not None
        self.is_active = bool(self.ops) and not (self._ramp and self._ramp.is_zero)
        start = self._ramp(0) if self._ramp else float(name == "diffaugment")
        self.register_buffer("probability", torch.tensor(start, dtype=torch.float32))
        self.register_buffer("sign_sum", torch.zeros((), dtype=torch.float32))
        self.register_buffer("sign_count", torch.zeros((), dtype=torch.float32))

    def forward(self, images: Tensor, keys: Tensor, purpose: int) -> Tensor:
        """Change images.

        Args:
            images: [B, C, H, W], about -1 to 1.
            keys: int64 [B].
            purpose: Of the draws, as `modules.keyed_draws`; another one for another use of a key.

        Returns:
            [B, C, H, W], of the dtype of the images.
        """
        if not self.is_active:
            return images
        wide = images.to(torch.promote_types(images.dtype, torch.float32))
        if self.name == "diffaugment":
            changed = diffaugment(wide, keys, purpose, ops=self.ops)
        else:
            changed = adaptive(wide, keys, purpose, probability=self.probability, ops=self.ops)
        return changed.to(images.dtype)

    @torch.no_grad()
    def observe(self, signs_sum: Tensor, count: Tensor | int) -> None:
        """Take note of how the discriminator judged real images.

        Under a relativistic loss a logit alone means nothing, and its sign is that of the real
        image's less the generated one's.

        Args:
            signs_sum: fp32 [], the sum of the signs of logits of real images over all ranks. If it
                is not finite, the observation is left out.
            count: How many they are.
        """
        is_finite = signs_sum.isfinite()
        self.sign_sum += torch.where(is_finite, signs_sum, 0)
        self.sign_count += torch.where(is_finite, count, 0)

    @torch.no_grad()
    def adjust(self, step: int, images: int) -> None:
        """Set p for the next step; never waits for the device.

        A controlled p moves after every `interval_steps` by one `speed_images`-th for each image
        observed, up where the mean sign is above `target` and down below it, within 0 and 1.

        Args:
            step: Steps of the run that are done.
            images: Images that training has seen.
        """
        if self._ramp is not None:
            self.probability.fill_(self._ramp(images))
        if self._control is None or step % self._control["interval_steps"]:
            return
        # Without any observation the count, and with it the change, is zero.
        direction = (self.sign_sum - self._control["target"] * self.sign_count).sign()
        change = direction * self.sign_count / self._control["speed_images"]
        self.probability.copy_((self.probability + change).clamp(0, 1))
        self.sign_sum.zero_()
        self.sign_count.zero_()


def _choose_ops(name: str, ops: Sequence[str] | None, channels: int) -> frozenset[str]:
    if name not in AUGMENTATIONS:
        raise ValueError(
            f"module.augmentation.name={name} -> unknown -> choose one of "
            f"{', '.join(AUGMENTATIONS)}"
        )
    if name == "none":
        if ops is not None:
            raise ValueError(
                f"module.augmentation.ops={list(ops)} -> module.augmentation.name=none applies "
                "none -> set it to null, or choose a name"
            )
        return frozenset()
    groups, chosen = _GROUPS[name], set()
    left_out = _NEEDS_COLOR if channels == 1 else set()
    known = dict.fromkeys([*groups, *(op for members in groups.values() for op in members)])
    for op in groups if ops is None else ops:
        if op not in known:
            raise ValueError(
                f"module.augmentation.ops={list(ops or ())} -> {op} is unknown under {name} -> "
                f"choose out of {', '.join(known)}"
            )
        if op in left_out:
            raise ValueError(
                f"module.augmentation.ops={list(ops or ())} -> {op} changes nothing in images of "
                "one channel -> leave it out"
            )
        chosen |= set(groups.get(op, (op,))) - left_out
    return frozenset(chosen)


def _choose_probability(
    name: str, probability: float | Mapping[str, Any] | None, max_images: int
) -> tuple[Ramp | None, Mapping[str, Any] | None]:
    """A ramp or what p is controlled by; neither where there is no p to choose."""
    key = "module.augmentation.probability"
    if name != "adaptive":
        if probability is not None:
            raise ValueError(
                f"{key}={probability} -> module.augmentation.name={name} has none -> set it to "
                "null, or choose adaptive"
            )
        return None, None
    if probability is None:
        raise ValueError(
            f"{key}=null -> module.augmentation.name=adaptive needs one -> set a number, a ramp "
            "{start, end, images, shape} or {target, speed_images, interval_steps}"
        )
    if not (isinstance(probability, Mapping) and _CONTROL & set(probability)):
        return Ramp(probability, key, max_images, bounds=(0.0, 1.0)), None
    if set(probability) != _CONTROL:
        raise ValueError(
            f"{key}={dict(probability)} -> a controlled probability has other keys -> give target, "
            "speed_images and interval_steps, and no others"
        )
    if not 0 < probability["target"] < 1:
        raise ValueError(
            f"{key}.target={probability['target']} -> it is a mean of signs, 1 where all real "
            "images are told -> choose above 0 and below 1, 0.6 as published"
        )
    for part in ("speed_images", "interval_steps"):
        if probability[part] < 1:
            raise ValueError(f"{key}.{part}={probability[part]} -> it is a count -> use 1 or more")
    return None, probability
