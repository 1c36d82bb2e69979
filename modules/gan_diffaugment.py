"""Differentiable augmentation (DiffAugment) of all images that a discriminator sees.

Zhao et al. 2020, arXiv 2006.10738, section 3.2, the policy "color, translation, cutout" with the
ranges of the authors' code. Images are about -1 to 1.

Legend: B images of C channels, H rows and W columns.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from modules.keyed_draws import uniform

GROUPS = {
    "color": ("brightness", "saturation", "contrast"),
    "translation": ("translation",),
    "cutout": ("cutout",),
}
_TRANSLATION = 0.125  # largest, as a share of the image
_CUTOUT = 0.5  # side of the square, as a share of the image


def diffaugment(images: Tensor, keys: Tensor, purpose: int, *, ops: Collection[str]) -> Tensor:
    """Apply all of some operations to every image.

    * `brightness`: adds -0.5 to 0.5
    * `saturation`: 0 to 2 times the distance from the grey of the pixel
    * `contrast`: 0.5 to 1.5 times the distance from the mean of the image
    * `translation`: by up to an eighth of the image each way; zeros come in
    * `cutout`: zeros in a square of half the image's side, partly outside at times

    Args:
        images: [B, C, H, W], fp32 or fp64.
        keys: int64 [B].
        purpose: Of the draws, as `modules.keyed_draws`.
        ops: Out of those above; they are applied in that order.

    Returns:
        [B, C, H, W].
    """
    draws = uniform(keys, purpose, 7)  # all, so that one operation leaves the others as they are
    light, saturation, contrast = (draws[:, i, None, None, None] for i in range(3))
    if "brightness" in ops:
        images = images + (light - 0.5)
    if "saturation" in ops:
        grey = images.mean(1, keepdim=True)
        images = (images - grey) * (2 * saturation) + grey
    if "contrast" in ops:
        mean = images.mean((1, 2, 3), keepdim=True)
        images = (images - mean) * (contrast + 0.5) + mean
    if "translation" in ops:
        images = _translate(images, draws[:, 3:5])
    if "cutout" in ops:
        images = _cut_out(images, draws[:, 5:7])
    return images


def _translate(images: Tensor, draws: Tensor) -> Tensor:
    for dim, size in ((2, images.size(2)), (3, images.size(3))):
        most = int(size * _TRANSLATION + 0.5)
        shift = _integer(draws[:, dim - 2], 2 * most + 1) - most
        source = torch.arange(size, device=images.device) + shift  # [B, size]
        shape = [len(images), 1, 1, 1]
        shape[dim] = size
        is_inside = ((source >= 0) & (source < size)).view(shape)
        index = source.clamp(0, size - 1).view(shape).expand_as(images)
        images = images.gather(dim, index) * is_inside
    return images


def _cut_out(images: Tensor, draws: Tensor) -> Tensor:
    is_cut = []
    for size, draw in zip(images.shape[2:], draws.unbind(1), strict=True):
        side = int(size * _CUTOUT + 0.5)
        begin = _integer(draw, size + 1 - side % 2) - side // 2
        place = torch.arange(size, device=images.device)
        is_cut.append((place >= begin) & (place < begin + side))  # [B, size]
    rows, columns = is_cut
    return images * ~(rows[:, None, :, None] & columns[:, None, None, :])


def _integer(draws: Tensor, count: int) -> Tensor:
    """Whole numbers below `count`, int64 [B, 1], of draws in [0, 1)."""
    return (draws * count).long()[:, None]
