"""What the networks of GANs look like, by name.

Sizes that follow from the resolution of the images are in the networks' own files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from modules.presets import choose, refuse_unknown

_NORMS = {"norm": ("batch", "none")}


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """What all shapes have.

    Attributes:
        noise_size: Z, of the noise a generator makes an image of.
        width_factor: Of all published numbers of channels, which it multiplies.
    """

    noise_size: int
    width_factor: float

    def __post_init__(self):
        if self.width_factor <= 0:
            raise ValueError(
                f"module.network.width_factor={self.width_factor} -> leaves nothing to compute "
                "with -> choose more than 0"
            )

    def scaled(self, width: int) -> int:
        """Number of channels for a published one."""
        return max(1, round(width * self.width_factor))


@dataclass(frozen=True, kw_only=True)
class DCGANShape(_Sizes):
    """The DCGAN of tutorials (`modules/gan_dcgan.py`).

    Attributes:
        norm: Of the generator: `batch`, or `none`: gains and biases are left.
        dropout: Probability, in the discriminator.
    """

    norm: Literal["batch", "none"]
    dropout: float

    def __post_init__(self):
        super().__post_init__()
        refuse_unknown(self, _NORMS)


@dataclass(frozen=True, kw_only=True)
class SNGANShape(_Sizes):
    """Residual networks with spectral norm (`modules/gan_sngan.py`).

    Attributes:
        norm: Of the generator: `batch`, or `none`: gains and biases, of classes too, are left.
    """

    norm: Literal["batch", "none"]

    def __post_init__(self):
        super().__post_init__()
        refuse_unknown(self, _NORMS)


@dataclass(frozen=True, kw_only=True)
class R3GANShape(_Sizes):
    """Residual networks without normalisation (`modules/gan_r3gan.py`).

    Attributes:
        blocks_per_stage: Residual blocks at each resolution.
    """

    blocks_per_stage: int


GANShape = DCGANShape | SNGANShape | R3GANShape

PRESETS: dict[str, GANShape] = {
    "dcgan": DCGANShape(noise_size=100, width_factor=1.0, norm="batch", dropout=0.3),
    "dcgan_tiny": DCGANShape(noise_size=16, width_factor=1 / 16, norm="batch", dropout=0.3),
    "sngan": SNGANShape(noise_size=128, width_factor=1.0, norm="batch"),
    "sngan_tiny": SNGANShape(noise_size=16, width_factor=1 / 16, norm="batch"),
    # The authors' CIFAR-10, FFHQ-64 and FFHQ-256: what differs follows from the resolution.
    "r3gan": R3GANShape(noise_size=64, width_factor=1.0, blocks_per_stage=2),
    "r3gan_tiny": R3GANShape(noise_size=16, width_factor=1 / 24, blocks_per_stage=1),
}


def shape_from(preset: str, overrides: Mapping[str, Any]) -> GANShape:
    """Choose a shape.

    Args:
        preset: A name of `PRESETS`.
        overrides: Fields of its shape; None, also of another kind's, means as the preset has it.

    Raises:
        ValueError: There is no such preset, an override is none of its shape, or impossible.
    """
    chosen = {key: value for key, value in overrides.items() if value is not None}
    return choose(PRESETS, preset, chosen)


def form_of(forms: Mapping[int, tuple[Any, ...]], resolution: int, has: str) -> tuple[Any, ...]:
    """Look up what networks have at a resolution that they are published for.

    Args:
        forms: By resolution.
        resolution: Pixels a side.
        has: What the networks have, for messages.

    Raises:
        ValueError: There is none for the resolution.
    """
    if resolution not in forms:
        raise ValueError(
            f"datamodule.resolution={resolution} -> {has} for {', '.join(map(str, forms))} pixels "
            "-> choose one of them, or a preset r3gan"
        )
    return forms[resolution]
