"""R3GAN: residual networks without any normalisation (Huang et al. 2024, arXiv 2501.05441).

A stage of blocks for each resolution from 4x4 on, doubled or halved between them by a small filter;
the discriminator mirrors the generator. Numbers of channels follow from the resolution by a rule
that gives the authors' networks for CIFAR-10, FFHQ-64 and FFHQ-256. Any power of two from 8 on.

Legend: B batch, C channels, H rows, W columns, Z noise.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.gan_initial_values import Draw, normal, scaled_normal, zeros
from modules.gan_layers import Conv2d, Discriminator, Embedding, Generator, Linear, at_least_fp32
from modules.gan_presets import R3GANShape

START = 4
"""Rows and columns of the coarsest stage."""
MAX_WIDTH, WIDTH_PIXELS = 768, 24576
"""C of a stage of H rows is the less of the first, and of the second over H."""
EXPANSION = 2
GROUP_WIDTH = 16
"""Channels that the grouped convolution of a block mixes with each other."""
LEAK = 0.2
GAIN = math.sqrt(2 / (1 + LEAK**2))
"""By which weights before a LeakyReLU start larger, to keep the variance (He et al. 2015)."""
FILTER = (1.0, 3.0, 3.0, 1.0)
"""[1, 2, 1] for pixels that are each two pixels of the finer grid, so convolved with [1, 1]."""


def widths_of(shape: R3GANShape, resolution: int) -> list[int]:
    """Numbers of channels by stage, from 4x4 on.

    Scaled ones are rounded to what a group of expanded channels divides.

    Args:
        shape: Of the network.
        resolution: Of the finest stage.

    Raises:
        ValueError: Doubling 4 does not lead to the resolution.
    """
    num_stages = int(math.log2(max(resolution, 1) / START)) + 1 if resolution >= START else 0
    if num_stages < 2 or START << (num_stages - 1) != resolution:
        raise ValueError(
            f"datamodule.resolution={resolution} -> R3GAN doubles {START} pixels stage by stage -> "
            "choose a power of two from 8 on"
        )
    unit = GROUP_WIDTH // EXPANSION
    published = [min(MAX_WIDTH, WIDTH_PIXELS // (START << stage)) for stage in range(num_stages)]
    return [unit * max(1, round(width * shape.width_factor / unit)) for width in published]


class BiasedLeakyReLU(nn.Module):
    """LeakyReLU of the input plus a bias for each channel.

    Args:
        channels: C.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(channels))
        self.draws: dict[str, Draw] = {"bias": zeros}

    def forward(self, x: Tensor) -> Tensor:
        """Transform `x` [B, C, H, W]."""
        return F.leaky_relu(x + self.bias.to(x.dtype).view(-1, 1, 1), LEAK)


class Block(nn.Module):
    """A residual block: 1x1 convolution to twice the channels, grouped 3x3, 1x1 back.

    The branch starts at 0, and what precedes its last convolution is scaled by L^(-1 / (2 m - 2))
    for L blocks of m convolutions (Zhang et al. 2019, arXiv 1901.09321), so that steps of the whole
    network stay as large as without it.

    Args:
        width: C.
        num_blocks: L.
    """

    def __init__(self, width: int, num_blocks: int):
        super().__init__()
        inner, m = EXPANSION * width, 3
        draw = partial(scaled_normal, gain=GAIN * num_blocks ** (-1 / (2 * m - 2)))
        groups = inner // GROUP_WIDTH
        self.conv1 = Conv2d(width, inner, 1, has_bias=False, draw=draw)
        self.activation1 = BiasedLeakyReLU(inner)
        self.conv2 = Conv2d(inner, inner, 3, groups=groups, has_bias=False, draw=draw)
        self.activation2 = BiasedLeakyReLU(inner)
        self.conv3 = Conv2d(inner, width, 1, has_bias=False, draw=zeros)

    def forward(self, x: Tensor) -> Tensor:
        """Transform `x` [B, C, H, W]."""
        hidden = self.activation1(self.conv1(x))
        return x + self.conv3(self.activation2(self.conv2(hidden)))


class Resampling(nn.Module):
    """Doubles or halves rows and columns by a filter, as StyleGAN's (Karras et al. 2019).

    Up: zeros between pixels, filter, 4 times as bright. Down: filter, every second pixel. Pixels
    beyond the border count as 0.
    """

    filter: Tensor

    def __init__(self):
        super().__init__()
        taps = torch.tensor(FILTER)
        kernel = taps.outer(taps) / taps.sum() ** 2
        self.register_buffer("filter", kernel[None, None], persistent=False)

    def up(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, 2 H, 2 W]."""
        kernel = 4 * self.filter.to(x.dtype).expand(x.size(1), -1, -1, -1)
        return F.conv_transpose2d(x, kernel, stride=2, padding=1, groups=x.size(1))

    def down(self, x: Tensor) -> Tensor:
        """[B, C, 2 H, 2 W] to [B, C, H, W]."""
        kernel = self.filter.to(x.dtype).expand(x.size(1), -1, -1, -1)
        return F.conv2d(x, kernel, stride=2, padding=1, groups=x.size(1))


class Basis(nn.Module):
    """A learned 4x4 image of C channels, each scaled by a linear function of the noise.

    Args:
        inputs: Size of the noise.
        channels: C.
    """

    def __init__(self, inputs: int, channels: int):
        super().__init__()
        self.basis = nn.Parameter(torch.empty(channels, START, START))
        self.draws: dict[str, Draw] = {"basis": normal}
        self.linear = Linear(inputs, channels, has_bias=False, draw=scaled_normal)

    def forward(self, noise: Tensor) -> Tensor:
        """Transform `noise` [B, inputs] to [B, C, 4, 4]."""
        scales = self.linear(noise)
        return self.basis.to(scales.dtype) * scales[..., None, None]


def _transition(inputs: int, outputs: int) -> nn.Module:
    if inputs == outputs:
        return nn.Identity()
    return Conv2d(inputs, outputs, 1, has_bias=False, draw=scaled_normal)


def _stages(shape: R3GANShape, widths: list[int]) -> nn.ModuleList:
    """The blocks of each stage, for `widths` in the order of use."""
    num_blocks = shape.blocks_per_stage * len(widths)
    return nn.ModuleList(
        nn.ModuleList(Block(width, num_blocks) for _ in range(shape.blocks_per_stage))
        for width in widths
    )


class R3GANGenerator(Generator):
    """Noise to images, not bounded; a label's vector, as long as the noise, is appended to it."""

    def _build(
        self, shape: R3GANShape, resolution: int, channels: int, num_classes: int | None
    ) -> None:
        widths, inputs = widths_of(shape, resolution), shape.noise_size
        self.noise_size = shape.noise_size
        if num_classes is not None:
            draw = partial(normal, deviation=num_classes**-0.5)  # a matrix of one-hot labels
            self.embedding = Embedding(num_classes, shape.noise_size, draw=draw)
            inputs += shape.noise_size
        self.basis = Basis(inputs, widths[0])
        self.stages = _stages(shape, widths)
        self.transitions = nn.ModuleList(map(_transition, widths, widths[1:]))
        self.resampling = Resampling()
        self.output = Conv2d(widths[-1], channels, 1, has_bias=False, draw=scaled_normal)

    @property
    def blocks(self) -> list[nn.Module]:
        """The residual blocks."""
        return [block for stage in self.stages for block in stage]  # type: ignore[attr-defined]

    def _make(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        if labels is not None:
            noise = torch.cat([noise, self.embedding(labels, noise.dtype)], dim=1)
        x = self.basis(noise)
        for index, stage in enumerate(self.stages):
            if index:
                x = self.resampling.up(self.transitions[index - 1](x))
            for block in stage:  # type: ignore[attr-defined]
                x = block(x)
        return self.output(x)


class R3GANDiscriminator(Discriminator):
    """Images to logits; with classes the inner product of features with a label's vector."""

    def _build(
        self, shape: R3GANShape, resolution: int, channels: int, num_classes: int | None
    ) -> None:
        widths = widths_of(shape, resolution)[::-1]
        features = 1 if num_classes is None else widths[-1]
        self.input = Conv2d(channels, widths[0], 1, has_bias=False, draw=scaled_normal)
        self.stages = _stages(shape, widths)
        self.transitions = nn.ModuleList(map(_transition, widths, widths[1:]))
        self.resampling = Resampling()
        self.basis = Conv2d(
            widths[-1], widths[-1], START, groups=widths[-1], padding=0, has_bias=False,
            draw=scaled_normal,
        )  # fmt: skip
        self.linear = Linear(widths[-1], features, has_bias=False, draw=scaled_normal)
        if num_classes is not None:
            draw = partial(normal, deviation=(num_classes * features) ** -0.5)
            self.embedding = Embedding(num_classes, features, draw=draw)

    @property
    def blocks(self) -> list[nn.Module]:
        """The residual blocks."""
        return [block for stage in self.stages for block in stage]  # type: ignore[attr-defined]

    def _judge(self, images: Tensor, labels: Tensor | None) -> Tensor:
        x = self.input(images)
        for index, stage in enumerate(self.stages):
            if index:
                x = self.transitions[index - 1](self.resampling.down(x))
            for block in stage:  # type: ignore[attr-defined]
                x = block(x)
        pooled = at_least_fp32(self.basis(x).flatten(1))
        with torch.autocast(pooled.device.type, enabled=False):
            features = self.linear(pooled)  # [B, 1] or [B, C]
            if labels is not None:
                features = self.embedding(labels, features.dtype) * features
            return features.sum(1)
