"""The moving average of a generator: what is scored, shown, drawn from and exported.

Legend: B images, C channels, H rows, W columns, Z numbers of noise.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from enum import IntEnum
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from modules.gan_pictures import cycle_labels, drawings, generate
from modules.keyed_draws import evaluation_keys, normal
from modules.ramps import Ramp


class Purpose(IntEnum):
    """What is drawn from the key of an image; each has numbers of its own."""

    NOISE = 1
    FRESH_NOISE = 2
    REAL = 3  # augmentation, and so on
    FAKE = 4
    FRESH_FAKE = 5
    INTERPOLATION = 6
    MIXED = 7


class MovingAverage(nn.Module):
    """A copy of a generator that follows its weights with a half-life in images.

        average <- d average + (1 - d) weights,  d = 0.5 ^ (B / half-life)

    Karras et al. 2020, arXiv 2006.06676, appendix D. Its half-life is at most `ramp_up` times the
    images seen, so that the average follows early on. All of it are buffers: no strategy shards
    them, no optimizer drives them, and every checkpoint has them, in fp32.

    Args:
        generator: Whose weights to start from.
        half_life_images: As `Ramp`.
        ramp_up: None: no bound.
        batch_images: B, of a round.
        max_images: Of the run.
        num_classes: Of a conditional generator, else None.
        seed: Of what is drawn.

    Raises:
        ValueError: A setting is impossible.
    """

    def __init__(
        self,
        generator: nn.Module,
        *,
        half_life_images: Any,
        ramp_up: float | None,
        batch_images: int,
        max_images: int,
        num_classes: int | None,
        seed: int,
    ):
        super().__init__()
        key = "module.ema.half_life_images"
        self.half_life = Ramp(half_life_images, key=key, max_images=max_images)
        if ramp_up is not None and not ramp_up > 0:
            raise ValueError(
                f"module.ema.ramp_up={ramp_up} -> a share of the images seen -> above 0"
            )
        self.ramp_up, self.batch_images = ramp_up, batch_images
        self.num_classes, self.seed = num_classes, seed
        self.network = as_buffers(copy.deepcopy(generator))
        self.noise_size: int = generator.noise_size  # type: ignore[assignment]

    def decay(self, images: int) -> float:
        """Share that the round after `images` images keeps."""
        half_life = self.half_life(images)
        if self.ramp_up is not None:
            half_life = min(half_life, images * self.ramp_up)
        return 0.5 ** (self.batch_images / half_life) if half_life > 0 else 0.0

    @torch.no_grad()
    def follow(
        self,
        images: int,
        parameters: Iterable[tuple[str, Tensor]],
        buffers: Iterable[tuple[str, Tensor]],
    ) -> None:
        """Move towards a generator's whole parameters, one at a time; copy its statistics."""
        share, own = 1 - self.decay(images), dict(self.network.named_buffers())
        for name, value in parameters:
            own[name].lerp_(value, share)
        for name, value in buffers:
            own[name].copy_(value)

    def imagine(self, keys: Tensor, labels: Tensor | None, truncation: float = 1.0) -> Tensor:
        """Make images, uint8 [B, C, H, W], of keys int64 [B] and labels int64 [B].

        Noise is scaled by `truncation`: below 1 images are more typical and vary less.
        """
        return generate(
            self.network, truncation * normal(keys, Purpose.NOISE, self.noise_size), labels
        )

    def synthesize(
        self, numbers: range, *, seed: int, truncation: float, classes: list[int] | None
    ) -> Tensor:
        """Make images, uint8 [n, C, H, W].

        Args:
            numbers: Of the n images, in steps of 1.
            seed: An image is a function of it and of its number.
            truncation: Factor of the noise.
            classes: Whose turn it is, one after the other; None: all of a conditional generator.

        Raises:
            ValueError: There is no such class, or there are none.
        """
        own = torch.arange(numbers.start, numbers.stop, device=self._device)
        labels = cycle_labels(numbers, self.num_classes, own, classes)
        return self.imagine(evaluation_keys(seed, own), labels, truncation)

    def pictures(
        self, settings: Mapping[str, Any], real: Callable[[], Tensor]
    ) -> dict[str, Callable[[], NDArray]]:
        """Take a snapshot, and give by name what draws pictures of it, on any thread.

        Args:
            settings: Of `modules.gan_pictures.drawings`.
            real: Gives uint8 images [n, C, H, W], on the CPU, to look for neighbours in.
        """

        def noise(count: int) -> Tensor:
            keys = evaluation_keys(self.seed, torch.arange(count, device=self._device))
            return normal(keys, Purpose.NOISE, self.noise_size)

        return drawings(
            copy.deepcopy(self.network).eval(),
            settings=settings,
            noise=noise,
            num_classes=self.num_classes,
            real=real,
        )

    @property
    def _device(self) -> torch.device:
        return next(self.network.buffers()).device


def as_buffers(network: nn.Module) -> nn.Module:
    """Turn the parameters of a network into buffers of the same names, in place."""
    for module in network.modules():
        for name, parameter in list(module._parameters.items()):
            del module._parameters[name]
            value = None if parameter is None else parameter.detach().clone()
            module.register_buffer(name, value)
    return network


def to_floats(images: Tensor) -> Tensor:
    """From uint8, 0 to 255, to fp32, -1 to 1."""
    return images.float() / 127.5 - 1
