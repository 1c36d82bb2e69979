"""Pictures of what a generator has learned, as arrays for PNG files.

Noise is the caller's: the same noise in every picture of a run shows how an image develops.

Legend: B images, C channels (1 or 3), H rows, W columns, Z noise, N real images.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Picture = NDArray[np.uint8]
"""uint8 [height, width, 3]."""
Noise = Callable[[int], Tensor]
"""Gives the first B of a sequence of noises, float [B, Z], on the device of the network."""
_GAP, _GAP_SHADE = 2, 255  # pixels between tiles, white
_IMAGES_AT_ONCE = 64


def to_bytes(images: Tensor) -> Tensor:
    """Turn images (float, -1 is black, 1 white) into uint8 of the same shape, rounded and cut."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def generate(network: Any, noise: Tensor, labels: Tensor | None) -> Tensor:
    """Generate images (uint8 [B, C, H, W]) a few at a time; the network is in evaluation mode."""
    chunks = noise.split(_IMAGES_AT_ONCE)
    sorts = [None] * len(chunks) if labels is None else labels.split(_IMAGES_AT_ONCE)
    images = [to_bytes(network(z, label)) for z, label in zip(chunks, sorts, strict=True)]
    return torch.cat(images)


def tile(images: Tensor, columns: int | None = None) -> Picture:
    """Lay images out row by row, with gaps; grey ones become RGB.

    Args:
        images: uint8 [B, C, H, W].
        columns: In a row; None: as in a square.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    height, width = images.shape[2:]
    steps = (height + _GAP, width + _GAP)
    picture = np.full((rows * steps[0] + _GAP, columns * steps[1] + _GAP, 3), _GAP_SHADE, np.uint8)
    for place, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        top, left = (_GAP + n * s for n, s in zip(divmod(place, columns), steps, strict=True))
        picture[top : top + height, left : left + width] = image
    return picture


def cycle_labels(
    num_images: int, num_classes: int | None, like: Tensor, classes: Any = None
) -> Tensor | None:
    """Labels in turn (int64 [B]) on the device of `like`; None where the network takes none.

    Args:
        num_images: B.
        num_classes: Of the network.
        like: Any tensor.
        classes: The labels to take, as a user gives them; None: all.

    Raises:
        ValueError: `classes` holds something else than the network's labels.
    """
    if classes is None:
        chosen = None if num_classes is None else range(num_classes)
    elif num_classes is None:
        raise ValueError(
            f"classes={classes} -> the run's networks know no classes -> leave it out, or train "
            "with labels"
        )
    elif not isinstance(classes, list) or not classes or {*classes} - {*range(num_classes)}:
        raise ValueError(
            f"classes={classes} -> classes are numbers from 0 to {num_classes - 1} -> choose some "
            "of them, as in classes=[0,1]"
        )
    else:
        chosen = classes
    if chosen is None:
        return None
    repeated = torch.arange(num_images, device=like.device) % len(chosen)
    return torch.tensor(chosen, device=like.device)[repeated]


def grid(
    network: Any, noise: Noise, num_classes: int | None, *, rows: int, columns: int
) -> Picture:
    """Images of the first noises, with labels in turn."""
    z = noise(rows * columns)
    return tile(generate(network, z, cycle_labels(len(z), num_classes, z)), columns)


def slerp(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """Walk from one noise to another on the arc between them, at constant speed.

    (Shoemake 1985; for noise White 2016, arXiv 1609.04468: on a straight line the norm becomes one
    that normal noise of many dimensions never has.) Noises of one direction have no arc; the line
    between them is taken.

    Args:
        first: float [B, Z].
        second: float [B, Z].
        share: float [B], 0 at the first, 1 at the second.
    """
    cosine = torch.cosine_similarity(first, second).clamp(-1, 1)
    angle = cosine.acos()
    is_line = angle.sin() < 1e-4
    sine = torch.where(is_line, 1, angle.sin())
    weights = [
        torch.where(is_line, straight, (straight * angle).sin() / sine)
        for straight in (1 - share, share)
    ]
    return weights[0].unsqueeze(1) * first + weights[1].unsqueeze(1) * second


def interpolation(
    network: Any, noise: Noise, num_classes: int | None, *, rows: int, columns: int
) -> Picture:
    """A walk from one noise to the next (`slerp`) in each row, which has one label."""
    ends = noise(2 * rows)
    first, second = (end.repeat_interleave(columns, 0) for end in (ends[::2], ends[1::2]))
    share = torch.linspace(0, 1, columns, device=ends.device).repeat(rows)
    labels = cycle_labels(rows, num_classes, ends)
    labels = None if labels is None else labels.repeat_interleave(columns)
    return tile(generate(network, slerp(first, second, share), labels), columns)


def truncation(
    network: Any, noise: Noise, num_classes: int | None, *, psis: list[float], columns: int
) -> Picture:
    """A row for each psi: the same noises, times psi.

    psi 1 is what the network is trained on; towards 0 images become alike, and mostly cleaner.
    Noise is scaled to its mean, which is zero. That is neither resampling (Brock et al. 2018,
    arXiv 1809.11096) nor scaling in a mapped space (Karras et al. 2018, arXiv 1812.04948), which
    these networks do not have; of a network that normalises its noise all rows would be equal.
    """
    z = noise(columns)
    labels = cycle_labels(columns, num_classes, z)
    images = [generate(network, z * psi, labels) for psi in psis]
    return tile(torch.cat(images), columns)


def classes(network: Any, noise: Noise, num_classes: int, *, columns: int) -> Picture:
    """A row for each class: of the same noises."""
    z = noise(columns)
    labels = torch.arange(num_classes, device=z.device).repeat_interleave(columns)
    return tile(generate(network, z.repeat(num_classes, 1), labels), columns)


def neighbours(
    network: Any,
    noise: Noise,
    num_classes: int | None,
    *,
    real: Tensor,
    rows: int,
    columns: int,
) -> Picture:
    """A generated image in each row, then the real ones nearest to it: is it a copy?

    Nearest by Euclidean distance of pixels, which finds copies and no more.

    Args:
        network: The generator.
        noise: For it.
        num_classes: For its labels.
        real: uint8 [N, C, H, W], `columns` - 1 or more.
        rows: Generated images.
        columns: One more than real images to show.
    """
    z = noise(rows)
    images = generate(network, z, cycle_labels(rows, num_classes, z))
    real = real.to(images.device)
    distances = torch.cdist(images.flatten(1).float(), real.flatten(1).float())  # [B, N]
    nearest = distances.topk(columns - 1, largest=False).indices
    together = torch.cat([images.unsqueeze(1), real[nearest]], dim=1)
    return tile(together.flatten(0, 1), columns)


def draw_all(
    network: Any,
    *,
    settings: Mapping[str, Mapping[str, Any] | None],
    noise: Noise,
    num_classes: int | None,
    real: Tensor | None,
) -> dict[str, Picture]:
    """Draw the pictures that are asked for and possible.

    Args:
        network: The generator, `network(noise, labels)`, in evaluation mode; nobody changes its
            weights meanwhile.
        settings: Of `grid`, `interpolation`, `truncation`, `classes` and `neighbours` by name what
            follows `*` there; None: that one is left out.
        noise: Gives the first ones of a fixed sequence.
        num_classes: None: the network takes no labels, and there is no picture of `classes`.
        real: uint8 [N, C, H, W]; None: there is no picture of `neighbours`.

    Returns:
        The pictures by name.
    """
    asked = {name: dict(chosen) for name, chosen in settings.items() if chosen is not None}
    if num_classes is None:
        asked.pop("classes", None)
    if real is None:
        asked.pop("neighbours", None)
    elif "neighbours" in asked:
        asked["neighbours"]["real"] = real
    return {name: DRAWINGS[name](network, noise, num_classes, **asked[name]) for name in asked}


DRAWINGS: dict[str, Callable[..., Picture]] = {
    drawing.__name__: drawing for drawing in (grid, interpolation, truncation, classes, neighbours)
}


def check_pictures(settings: Mapping[str, Mapping[str, Any] | None]) -> None:
    """Check `settings` of `draw_all`.

    Raises:
        ValueError: There is no picture of a name, or it has no room for an image.
    """
    for name, chosen in settings.items():
        if name not in DRAWINGS:
            raise ValueError(
                f"module.pictures.{name}={chosen} -> there is no such picture -> choose out of "
                f"{', '.join(DRAWINGS)}"
            )
        for key in ("rows", "columns"):
            least = 2 if (name, key) == ("neighbours", "columns") else 1
            number = (chosen or {}).get(key, least)
            if number < least:
                raise ValueError(
                    f"module.pictures.{name}.{key}={number} -> there is no room for the images -> "
                    f"choose {least} or more, or module.pictures.{name}=null for no such picture"
                )
