"""Settings whose value changes with the number of images that training has seen."""

import math
from collections.abc import Mapping
from typing import Any

SHAPES = ("linear", "cosine")
_KEYS = {"start", "end", "images", "shape"}


class Ramp:
    """A number, or one that goes from a start to an end and stays there.

    With t the share of the ramp that is done, 0 to 1:

    * `linear`: start + (end - start) t
    * `cosine`: end + (start - end) (1 + cos(pi t)) / 2, Loshchilov and Hutter 2016, arXiv
      1608.03983, equation 5, as Huang et al. 2025, arXiv 2501.05441, use it for most of what a GAN
      is set to

    Args:
        setting: A number, or `start`, `end`, `images` (of the ramp; None: the whole run) and
            `shape`.
        key: Of the setting, for messages.
        max_images: Of the run.
        bounds: Smallest and largest value allowed.

    Raises:
        ValueError: The setting is neither, incomplete, unknown or out of bounds.
    """

    def __init__(
        self,
        setting: float | Mapping[str, Any],
        key: str,
        max_images: int,
        bounds: tuple[float, float] = (0.0, math.inf),
    ):
        if isinstance(setting, Mapping):
            parts = _check_parts(setting, key)
        elif isinstance(setting, int | float) and not isinstance(setting, bool):
            parts = {"start": setting, "end": setting, "images": None, "shape": "linear"}
        else:
            raise ValueError(
                f"{key}={setting} -> neither a number nor a ramp -> set a number, or "
                "{start, end, images, shape}"
            )
        for part in ("start", "end"):
            if not isinstance(parts[part], int | float) or isinstance(parts[part], bool):
                raise ValueError(f"{key}.{part}={parts[part]} -> no number -> give one")
            if not bounds[0] <= parts[part] <= bounds[1]:
                raise ValueError(
                    f"{key}={setting} -> {parts[part]} is out of its bounds -> choose "
                    f"{bounds[0]:g} to {bounds[1]:g}"
                )
        self.start, self.end = float(parts["start"]), float(parts["end"])
        self.images, self.shape = parts["images"] or max_images, parts["shape"]

    @property
    def is_zero(self) -> bool:
        """Whether it is 0 throughout."""
        return self.start == self.end == 0

    def __call__(self, images: float) -> float:
        """Give the value after so many images of the run."""
        done = min(1.0, images / self.images)
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done


def _check_parts(setting: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    if set(setting) != _KEYS:
        raise ValueError(
            f"{key}={dict(setting)} -> a ramp has other keys -> give start, end, images and shape, "
            "and no others"
        )
    if setting["shape"] not in SHAPES:
        raise ValueError(
            f"{key}.shape={setting['shape']} -> unknown -> choose {' or '.join(SHAPES)}"
        )
    if setting["images"] is not None and setting["images"] < 1:
        raise ValueError(
            f"{key}.images={setting['images']} -> a ramp takes images -> use 1 or more, or null "
            "for the whole run"
        )
    return setting
