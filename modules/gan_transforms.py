"""Maps applied to images one by one, differentiable as often as asked for.

Legend: B images of C channels, H rows and W columns; x columns and y rows.
"""

import torch
from torch import Tensor


def product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply small matrices [B, n, n] in their own precision.

    Autocast and TF32 would round what says where a pixel lies.
    """
    return (left[:, :, :, None] * right[:, None]).sum(2)


def warp(images: Tensor, maps: Tensor) -> Tensor:
    """Sample images elsewhere, bilinearly, with what is beyond their edges reflected in them.

    The edge is not repeated, as in `mode="mirror"` of scipy and `mode="reflect"` of numpy's `pad`.
    A map without fractions moves pixels exactly. Built on gathering, which can be differentiated
    twice, as `grid_sample` of torch 2.11 cannot.

    Args:
        images: [B, C, H, W], H and W at least 2.
        maps: fp32 [B, 3, 3], from the homogeneous (x, y, 1) of the result to that of the images, in
            pixels from the centre.

    Returns:
        [B, C, H, W], of the wider dtype of both.
    """
    height, width = images.shape[2:]
    y = torch.arange(height, device=images.device) - (height - 1) / 2
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    across, down = (
        maps[:, i, 0, None, None] * x
        + maps[:, i, 1, None, None] * y[:, None]
        + maps[:, i, 2, None, None]
        for i in (0, 1)
    )  # [B, H, W]
    left, right_share = _cell(across + (width - 1) / 2, width)
    top, bottom_share = _cell(down + (height - 1) / 2, height)
    corner, pixels = top * width + left, images.flatten(2)

    def take(offset: int) -> Tensor:
        index = (corner + offset).flatten(1)[:, None].expand(-1, images.size(1), -1)
        return pixels.gather(2, index).view_as(images)

    # Two products, where a lerp would not give back the right pixel exactly.
    upper = take(0) * (1 - right_share) + take(1) * right_share
    lower = take(width) * (1 - right_share) + take(width + 1) * right_share
    return upper * (1 - bottom_share) + lower * bottom_share


def _cell(position: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Of positions [B, H, W], the pixel before each (int64) and the share of the next [B, 1, H, W].

    Positions are reflected into the image. The last pixel is wholly the next of the one before.
    """
    position = position.remainder(2 * (size - 1))
    position = torch.where(position > size - 1, 2 * (size - 1) - position, position)
    before = position.floor().clamp(max=size - 2)
    return before.long(), (position - before)[:, None]


def recolor(images: Tensor, maps: Tensor) -> Tensor:
    """Transform the colour of each pixel.

    Args:
        images: [B, C, H, W].
        maps: fp32 [B, C + 1, C + 1], of homogeneous colours.

    Returns:
        [B, C, H, W], of the wider dtype of both.
    """
    maps = maps[..., None, None]
    rows = [(maps[:, row, :-1] * images).sum(1) + maps[:, row, -1] for row in range(images.size(1))]
    return torch.stack(rows, 1)
