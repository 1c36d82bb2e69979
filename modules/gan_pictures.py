"""Pictures of what a generator has learned, as arrays for PNG files.

Noise is the caller's: the same noise in every picture of a run shows how an image develops.

Legend: B images, C channels (1 or 3), H rows, W columns, Z noise, N real images.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
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
_MOST_COMPARED, _COMPARED_BYTES = 4096, 64 * 2**20


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
    numbers: range, num_classes: int | None, like: Tensor, classes: Any = None
) -> Tensor | None:
    """Labels in turn (int64 [B]) on the device of `like`; None where the network takes none.

    Args:
        numbers: Of the B images, in steps of 1; whose turn it is goes by them.
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
    repeated = torch.arange(numbers.start, numbers.stop, device=like.device) % len(chosen)
    return torch.tensor(chosen, device=like.device)[repeated]


def grid(
    network: Any, noise: Noise, num_classes: int | None, *, rows: int, columns: int
) -> Picture:
    """Images of the first noises, with labels in turn."""
    z = noise(rows * columns)
    return tile(generate(network, z, cycle_labels(range(len(z)), num_classes, z)), columns)


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
    labels = cycle_labels(range(rows), num_classes, ends)
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
    labels = cycle_labels(range(columns), num_classes, z)
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
    real: Callable[[], Tensor],
    rows: int,
    columns: int,
) -> Picture:
    """A generated image in each row, then the real ones nearest to it: is it a copy?

    Nearest by Euclidean distance of pixels, which finds copies and no more.

    Args:
        network: The generator.
        noise: For it.
        num_classes: For its labels.
        real: Gives uint8 [N, C, H, W], on the CPU; fewer than are to be shown are all shown.
        rows: Generated images.
        columns: One more than real images to show.
    """
    z, among = noise(rows), real()
    images = generate(network, z, cycle_labels(range(rows), num_classes, z))
    nearest = among[_nearest(images, among, columns - 1)]
    together = torch.cat([images.cpu().unsqueeze(1), nearest], dim=1)
    return tile(together.flatten(0, 1), together.size(1))


def _nearest(images: Tensor, real: Tensor, count: int) -> Tensor:
    """Numbers of the `count` real images nearest to each of `images`; int64 [B, n] on the CPU.

    A few real images at a time are on the device of `images`, which is busy with training.
    """
    flat = images.flatten(1).float()
    distances, numbers = flat.new_empty(len(flat), 0), torch.empty(len(flat), 0, dtype=torch.int64)
    for first, chunk in enumerate(real.split(_IMAGES_AT_ONCE)):
        others = chunk.to(flat.device).flatten(1).float()
        # Without matrix products, whose rounding depends on how many images there are.
        found = torch.cdist(flat, others, compute_mode="donot_use_mm_for_euclid_dist")
        own = torch.arange(len(chunk)).expand(len(flat), -1) + first * _IMAGES_AT_ONCE
        distances, numbers = torch.cat([distances, found], 1), torch.cat([numbers, own], 1)
        kept = min(count, distances.size(1))
        distances, places = distances.topk(kept, largest=False)
        numbers = numbers.gather(1, places.cpu())
    return numbers


def num_compared(image_bytes: int, columns: int) -> int:
    """How many real images `neighbours` are looked for among.

    Args:
        image_bytes: Size of one, uint8; all together are not to take much memory.
        columns: Of the picture.
    """
    return min(_MOST_COMPARED, max(columns - 1, _COMPARED_BYTES // image_bytes))


def drawings(
    network: Any,
    *,
    settings: Mapping[str, Mapping[str, Any] | None],
    noise: Noise,
    num_classes: int | None,
    real: Callable[[], Tensor],
) -> dict[str, Callable[[], Picture]]:
    """Give what draws the pictures that are asked for and possible.

    Args:
        network: The generator, `network(noise, labels)`, in evaluation mode; nobody changes its
            weights meanwhile.
        settings: Of `grid`, `interpolation`, `truncation`, `classes` and `neighbours` by name what
            follows `*` there; None: that one is left out.
        noise: Gives the first ones of a fixed sequence.
        num_classes: None: the network takes no labels, and there is no picture of `classes`.
        real: As of `neighbours`.

    Returns:
        Functions by the name of what they draw.
    """
    asked = {name: dict(chosen) for name, chosen in settings.items() if chosen is not None}
    if num_classes is None:
        asked.pop("classes", None)
    if "neighbours" in asked:
        asked["neighbours"]["real"] = real
    return {
        name: partial(DRAWINGS[name], network, noise, num_classes, **chosen)
        for name, chosen in asked.items()
    }


DRAWINGS: dict[str, Callable[..., Picture]] = {
    drawing.__name__: drawing for drawing in (grid, interpolation, truncation, classes, neighbours)
}


def check_pictures(settings: Mapping[str, Mapping[str, Any] | None]) -> None:
    """Check `settings` of `drawings`.

    Raises:
        ValueError: There is no picture of a name, it takes other settings, or it has no room for
            an image.
    """
    for name, chosen in settings.items():
        key = f"module.pictures.{name}"
        if name not in DRAWINGS:
            raise ValueError(
                f"{key}={chosen} -> there is no such picture -> choose out of {', '.join(DRAWINGS)}"
            )
        if chosen is None:
            continue
        parameters = signature(DRAWINGS[name]).parameters.values()
        keys = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "real"]
        if not isinstance(chosen, Mapping) or {*chosen} != {*keys}:
            raise ValueError(
                f"{key}={chosen} -> it takes {' and '.join(keys)} -> give these and no others, or "
                f"{key}=null for no such picture"
            )
        for setting, value in chosen.items():
            if reason := _impossible(name, setting, value):
                raise ValueError(
                    f"{key}.{setting}={value} -> {reason}, or {key}=null for no such picture"
                )


def _impossible(name: str, setting: str, value: Any) -> str | None:
    """Why a picture cannot have a setting, and what to choose."""
    if setting == "psis":
        are_numbers = isinstance(value, list) and all(isinstance(v, int | float) for v in value)
        return None if value and are_numbers else "a row for each of them -> list numbers"
    least = 2 if (name, setting) == ("neighbours", "columns") else 1
    if not isinstance(value, int) or value < least:
        return f"there is no room for the images -> choose {least} or more"
    if name == "neighbours" and value > _MOST_COMPARED + 1:
        return f"there are {_MOST_COMPARED} real images to choose from -> choose fewer"
    return None
