"""The operations of adaptive discriminator augmentation (ADA), each for a share of the images.

Karras et al. 2020, arXiv 2006.06676, section 2.2 and appendix B, figure 12, with its distributions.
Departures: images are sampled bilinearly, not through the wavelet filter of the paper, and their
edges reflected as often as needed. Images are about -1 to 1.

Legend: B images of C channels, H rows and W columns; n = C + 1; p the probability.
"""

import math
from collections.abc import Callable, Collection
from functools import reduce

import torch
from torch import Tensor

from modules.gan_transforms import product, recolor, warp
from modules.keyed_draws import normal, uniform

GROUPS = {
    "blit": ("flip", "rotate90", "integer_translation"),
    "geometry": ("scale", "rotation", "anisotropic_scale", "fractional_translation"),
    "color": ("brightness", "contrast", "luma_flip", "hue", "saturation"),
}
_SCALE, _CONTRAST, _SATURATION = 0.2, 0.5, 1.0  # deviations of log2 of a factor
_BRIGHTNESS, _FRACTIONAL = 0.2, 0.125  # deviations; of a translation as a share of the image
_INTEGER = 0.125  # largest translation, as a share of the image

Stage = Callable[[Tensor, Tensor, tuple[int, ...]], Tensor]
"""Makes the maps [B, n, n] of uniform and normal draws, [B, 2] each, and of C, H and W.

A geometric one leads from the result to the image that it is made of.
"""


def adaptive(
    images: Tensor, keys: Tensor, purpose: int, *, probability: Tensor, ops: Collection[str]
) -> Tensor:
    """Apply some operations, each to each image with probability p.

    * `flip`: about the vertical axis or not, evenly
    * `rotate90`: 0 to 3 quarter turns
    * `integer_translation`: by whole pixels, up to an eighth of the image each way
    * `scale`: by 2^N(0, 0.2)
    * `rotation`: by any angle, before `anisotropic_scale`, after it, or both; one at least with
      probability p
    * `anisotropic_scale`: by 2^N(0, 0.2) across and its inverse down
    * `fractional_translation`: by N(0, 1/8) of the image each way
    * `brightness`: adds N(0, 0.2)
    * `contrast`: multiplies by 2^N(0, 0.5)
    * `luma_flip`: the sign of the part along the grey axis or not, evenly
    * `hue`: by any angle about the grey axis, of 3 channels
    * `saturation`: 2^N(0, 1) times the distance from the grey axis, of 3 channels

    Args:
        images: [B, C, H, W], fp32 or fp64.
        keys: int64 [B].
        purpose: Of the draws, as `modules.keyed_draws`.
        probability: fp32 [], p.
        ops: Out of those above; they are applied in that order.

    Returns:
        [B, C, H, W]. With p = 0 the images as they are.
    """
    stages = _GEOMETRY + _COLOR
    # For all of them, so that one left out leaves the others as they are.
    uniforms = uniform(keys, purpose, len(stages), 3)
    normals = normal(keys, purpose, len(stages), 2)
    size, of_two = tuple(images.shape[1:]), 1 - (1 - probability).sqrt()
    geometry, color = [], []
    for number, (op, stage) in enumerate(stages):
        if op in ops:
            own = stage(uniforms[:, number, 1:], normals[:, number], size)
            is_on = uniforms[:, number, 0] < (of_two if op == "rotation" else probability)
            unit = torch.eye(own.size(1), device=own.device)
            chosen = geometry if number < len(_GEOMETRY) else color
            chosen.append(torch.where(is_on[:, None, None], own, unit))
    if geometry:
        images = warp(images, reduce(product, geometry))
    if color:
        images = recolor(images, reduce(product, reversed(color)))
    return images


def _flip(uniforms: Tensor, normals: Tensor, size: tuple[int, ...]) -> Tensor:
    sign = 1 - 2 * (2 * uniforms[:, 0]).floor()
    return _linear(sign, 0, 0, 1)


def _rotate90(uniforms: Tensor, normals: Tensor, size: tuple[int, ...]) -> Tensor:
    angle = (4 * uniforms[:, 0]).floor() * (math.pi / 2)
    cos, sin = angle.cos().round(), angle.sin().round()  # exact, so that pixels are moved whole
    return _linear(cos, -sin, sin, cos)


def _integer_translation(uniforms: Tensor, normals: Tensor, size: tuple[int, ...]) -> Tensor:
    shares = (2 * uniforms - 1) * _INTEGER
    return _shift((shares[:, 0] * size[2]).round(), (shares[:, 1] * size[1]).round())


def _scale(uniforms: Tensor, normals: Tensor, size: tuple[int, ...]) -> Tensor:
    inverse = (-_SCALE * normals[:, 0]).exp2()
    return _linear(inverse, 0, 0, inverse)


def _rotation(uniforms: Tensor, normals: Tensor, size: tuple[int, ...]) -> Tensor:
    angle = (2 * uniforms[:, 0] - 1) * math.pi
    return _linear(angle.cos(), -angle.sin(), angle.sin(), angle.cos())


def _anisotropic_scale(uniforms: Tensor, normals: Tensor, size: tuple[int, ...]) -> Tensor:
    inverse = (-_SCALE * normals[:, 0]).exp2()
    return _linear(inverse, 0, 0, 1 / inverse)


def _fractional_translation(uniforms: Tensor, normals: Tensor, size: tuple[int, ...]) -> Tensor:
    shares = _FRACTIONAL * normals
    return _shift(shares[:, 0] * size[2], shares[:, 1] * size[1])


def _brightness(uniforms: Tensor, normals: Tensor, size: tuple[int, ...]) -> Tensor:
    maps = torch.eye(size[0] + 1, device=normals.device).repeat(len(normals), 1, 1)
    maps[:, :-1, -1] = _BRIGHTNESS * normals[:, :1]
    return maps


def _contrast(uniforms: Tensor, normals: Tensor, size: tuple[int, ...]) -> Tensor:
    factor = (_CONTRAST * normals[:, :1, None]).exp2()
    return _homogeneous(factor * torch.eye(size[0], device=normals.device))


def _luma_flip(uniforms: Tensor, normals: Tensor, size: tuple[int, ...]) -> Tensor:
    grey, other = _axes(size[0], uniforms)
    sign = 1 - 2 * (2 * uniforms[:, :1, None]).floor()
    return _homogeneous(sign * grey + other)


def _hue(uniforms: Tensor, normals: Tensor, size: tuple[int, ...]) -> Tensor:
    grey, other = _axes(size[0], uniforms)
    next_one = torch.eye(3, device=uniforms.device).roll(1, 0)
    turned = (next_one - next_one.T) / math.sqrt(3)  # the cross product with the axis (Rodrigues)
    angle = (2 * uniforms[:, :1, None] - 1) * math.pi
    return _homogeneous(grey + angle.cos() * other + angle.sin() * turned)


def _saturation(uniforms: Tensor, normals: Tensor, size: tuple[int, ...]) -> Tensor:
    grey, other = _axes(size[0], uniforms)
    return _homogeneous(grey + (_SATURATION * normals[:, :1, None]).exp2() * other)


_GEOMETRY: list[tuple[str, Stage]] = [
    ("flip", _flip),
    ("rotate90", _rotate90),
    ("integer_translation", _integer_translation),
    ("scale", _scale),
    ("rotation", _rotation),
    ("anisotropic_scale", _anisotropic_scale),
    ("rotation", _rotation),
    ("fractional_translation", _fractional_translation),
]
_COLOR: list[tuple[str, Stage]] = [
    ("brightness", _brightness),
    ("contrast", _contrast),
    ("luma_flip", _luma_flip),
    ("hue", _hue),
    ("saturation", _saturation),
]


def _linear(xx: Tensor, xy: Tensor | int, yx: Tensor | int, yy: Tensor | int) -> Tensor:
    """Take (x, y) to (xx x + xy y, yx x + yy y), of [B] each; [B, 3, 3]."""
    maps = torch.zeros(len(xx), 3, 3, device=xx.device)
    maps[:, 0, 0], maps[:, 0, 1] = xx, xy
    maps[:, 1, 0], maps[:, 1, 1] = yx, yy
    maps[:, 2, 2] = 1
    return maps


def _shift(across: Tensor, down: Tensor) -> Tensor:
    """Move the image by [B] pixels: what is there was as far on the other side."""
    maps = torch.eye(3, device=across.device).repeat(len(across), 1, 1)
    maps[:, 0, 2], maps[:, 1, 2] = -across, -down
    return maps


def _homogeneous(linear: Tensor) -> Tensor:
    """Extend maps [B, C, C] to [B, C + 1, C + 1]."""
    maps = torch.nn.functional.pad(linear, (0, 1, 0, 1))
    maps[:, -1, -1] = 1
    return maps


def _axes(channels: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Projections [C, C] onto the grey axis, and onto what is perpendicular to it."""
    grey = torch.full((channels, channels), 1 / channels, device=like.device)
    return grey, torch.eye(channels, device=like.device) - grey
