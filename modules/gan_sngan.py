"""Residual GANs with a spectrally normalised discriminator.

Miyato et al. 2018, arXiv 1802.05957, appendix B.4; conditional as Miyato and Koyama 2018, arXiv
1802.05637: batch norm by class in the generator, projection in the discriminator. Initial values,
shortcuts and the forms for 64x64 and 128x128 are as in those authors' code. At 32x32 that code has
no bias in the discriminator's last layer; here it has one at every resolution.

Legend: B batch, C channels, H rows, W columns, Z noise.
"""

import math
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.gan_initial_values import glorot_uniform
from modules.gan_layers import Conv2d, Discriminator, Embedding, Generator, Linear
from modules.gan_norms import BatchNorm
from modules.gan_presets import SNGANShape, form_of

START = 4
"""Rows and columns of what the generator's first layer makes."""
# By resolution: channels of the generator from there on, each block doubling rows and columns;
# channels of the discriminator's blocks, and how many of them, the first ones, halve.
_FORMS = {
    32: ((256, 256, 256, 256), (128, 128, 128, 128), 2),
    64: ((1024, 512, 256, 128, 64), (64, 128, 256, 512, 1024), 5),
    128: ((1024, 1024, 512, 256, 128, 64), (64, 128, 256, 512, 1024, 1024), 5),
}
Norm = partial(BatchNorm, momentum=0.1, epsilon=2e-5)
"""With Chainer's defaults."""
_before_relu = partial(glorot_uniform, gain=math.sqrt(2))


class UpBlock(nn.Module):
    """Batch norm, ReLU and 3x3 convolution, twice, and a shortcut; doubles rows and columns.

    Args:
        shape: Of the network.
        inputs: C of the input.
        outputs: C of the output.
        num_classes: Of the norms; None: unconditional.
    """

    def __init__(self, shape: SNGANShape, inputs: int, outputs: int, num_classes: int | None):
        super().__init__()
        is_normalising = shape.norm == "batch"
        self.norm1, self.norm2 = (
            Norm(width, num_classes=num_classes, is_normalising=is_normalising)
            for width in (inputs, outputs)
        )
        self.conv1 = Conv2d(inputs, outputs, 3, has_bias=True, draw=_before_relu)
        self.conv2 = Conv2d(outputs, outputs, 3, has_bias=True, draw=_before_relu)
        self.shortcut = Conv2d(inputs, outputs, 1, has_bias=True, draw=glorot_uniform)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """Transform `x` [B, C, H, W] to [B, outputs, 2 H, 2 W]; `labels` int64 [B]."""
        hidden = self.conv1(_double(F.relu(self.norm1(x, labels))))
        hidden = self.conv2(F.relu(self.norm2(hidden, labels)))
        # A 1x1 convolution of copies is copies of the convolution, a quarter of the work.
        return hidden + _double(self.shortcut(x))


class DownBlock(nn.Module):
    """ReLU and 3x3 convolution, twice, and a shortcut, which all have spectral norm.

    Args:
        inputs: C of the input.
        outputs: C of the output.
        is_first: Whether the input is an image: then no ReLU comes before the first convolution.
        is_halving: Whether rows and columns are averaged in pairs at the end.
    """

    def __init__(self, inputs: int, outputs: int, *, is_first: bool, is_halving: bool):
        super().__init__()
        self.is_first, self.is_halving = is_first, is_halving
        hidden = outputs if is_first else inputs
        self.conv1 = _spectral_conv(inputs, hidden, 3)
        self.conv2 = _spectral_conv(hidden, outputs, 3)
        if is_halving or inputs != outputs:
            self.shortcut = _spectral_conv(inputs, outputs, 1)
        else:
            self.shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Transform `x` [B, C, H, W] to [B, outputs, H, W], or half of H and W."""
        hidden = self.conv1(x if self.is_first else F.relu(x))
        hidden = self.conv2(F.relu(hidden))
        if self.is_halving:  # a 1x1 convolution of means is the mean of its results
            hidden, x = F.avg_pool2d(hidden, 2), F.avg_pool2d(x, 2)
        return hidden + self.shortcut(x)


class SNGANGenerator(Generator):
    """Noise to images within [-1, 1]."""

    def _build(
        self, shape: SNGANShape, resolution: int, channels: int, num_classes: int | None
    ) -> None:
        widths, _, _ = form_of(_FORMS, resolution, "an SNGAN has blocks")
        widths = [shape.scaled(width) for width in widths]
        self.noise_size = shape.noise_size
        features = widths[0] * START**2
        self.dense = Linear(shape.noise_size, features, has_bias=True, draw=glorot_uniform)
        self.layers = nn.ModuleList(UpBlock(shape, *pair, num_classes) for pair in pairwise(widths))
        self.norm = Norm(widths[-1], is_normalising=shape.norm == "batch")
        self.output = Conv2d(widths[-1], channels, 3, has_bias=True, draw=glorot_uniform)

    def _make(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        x = self.dense(noise).unflatten(1, (-1, START, START))  # [B, C, H, W]
        for layer in self.layers:
            x = layer(x, labels)
        return torch.tanh(self.output(F.relu(self.norm(x))))


class SNGANDiscriminator(Discriminator):
    """Images to logits; a label's vector is compared with the last features."""

    def _build(
        self, shape: SNGANShape, resolution: int, channels: int, num_classes: int | None
    ) -> None:
        _, widths, num_halving = form_of(_FORMS, resolution, "an SNGAN has blocks")
        widths = [channels, *(shape.scaled(width) for width in widths)]
        self.layers = nn.ModuleList(
            DownBlock(*pair, is_first=i == 0, is_halving=i < num_halving)
            for i, pair in enumerate(pairwise(widths))
        )
        self.dense = Linear(widths[-1], 1, has_bias=True, draw=glorot_uniform, is_spectral=True)
        if num_classes is not None:
            self.embedding = Embedding(
                num_classes, widths[-1], draw=glorot_uniform, is_spectral=True
            )

    def _judge(self, images: Tensor, labels: Tensor | None) -> Tensor:
        x = images
        for layer in self.layers:
            x = layer(x)
        features = F.relu(x).sum((2, 3))  # [B, C]
        return self._project(features, labels)


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def _spectral_conv(inputs: int, outputs: int, kernel: int) -> Conv2d:
    draw = _before_relu if kernel > 1 else glorot_uniform
    return Conv2d(inputs, outputs, kernel, has_bias=True, draw=draw, is_spectral=True)
