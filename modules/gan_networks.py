"""The generator and the discriminator that a preset of the GAN family names."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from modules.gan_dcgan import DCGANDiscriminator, DCGANGenerator
from modules.gan_layers import Network
from modules.gan_norms import BatchNorm
from modules.gan_presets import DCGANShape, R3GANShape, SNGANShape, shape_from
from modules.gan_r3gan import R3GANDiscriminator, R3GANGenerator
from modules.gan_sngan import SNGANDiscriminator, SNGANGenerator

_NETWORKS: dict[type, tuple[Any, Any]] = {
    DCGANShape: (DCGANGenerator, DCGANDiscriminator),
    SNGANShape: (SNGANGenerator, SNGANDiscriminator),
    R3GANShape: (R3GANGenerator, R3GANDiscriminator),
}


def build_networks(
    preset: str,
    overrides: Mapping[str, Any],
    *,
    resolution: int,
    channels: int,
    num_classes: int | None,
    seed: int,
) -> tuple[Network, Network]:
    """Build both networks on the CPU, with initial values.

    The generator makes images [B, channels, resolution, resolution], about within [-1, 1], of noise
    [B, `noise_size`] and labels; the discriminator gives such images logits [B]. Parameters depend
    on the seed and their names alone.

    Args:
        preset: A name of `gan_presets.PRESETS`.
        overrides: Fields of its shape; None means as the preset has it.
        resolution: Pixels a side.
        channels: Of an image.
        num_classes: Of labels, or None: unconditional, without labels.
        seed: Of the run.

    Raises:
        ValueError: There is no such preset, override or network for the resolution.
    """
    shape = shape_from(preset, overrides)
    generator, discriminator = (
        network(shape, resolution=resolution, channels=channels, num_classes=num_classes)
        for network in _NETWORKS[type(shape)]
    )
    generator.initialise("generator", seed)
    discriminator.initialise("discriminator", seed)
    return generator, discriminator


def choose_classes(num_classes: int | None, *, conditional: bool) -> int | None:
    """Number of classes that networks know: those of the data, or None.

    Args:
        num_classes: Of the data; None where it has no labels.
        conditional: Whether to train on labels.

    Raises:
        ValueError: There are none to train on.
    """
    if not isinstance(conditional, bool):
        raise ValueError(f"module.conditional={conditional} -> yes or no -> true or false")
    if conditional and num_classes is None:
        raise ValueError(
            "module.conditional=true -> the data has no labels -> give labelled images "
            "(docs/data.md), or set it to false"
        )
    return num_classes if conditional else None


def refuse_lone_images(network: nn.Module, micro_batch: int) -> None:
    """Refuse batch norm over one image.

    Raises:
        ValueError: It would have no statistics.
    """
    norms = (module for module in network.modules() if isinstance(module, BatchNorm))
    if micro_batch == 1 and any(norm.is_normalising for norm in norms):
        raise ValueError(
            "micro_batch=1 -> batch norm of the generator has one image to take statistics of -> "
            "use 2 or more, or module.network.norm=none"
        )
