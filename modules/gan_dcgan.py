"""The DCGAN of tutorials: transposed convolutions against strided ones.

Radford et al. 2015, arXiv 1511.06434, in the form of TensorFlow's tutorial for 28x28 digits, which
normalises the generator alone and drops out in the discriminator, so that the discriminator sees
samples independently. 32x32 and 64x64 have the paper's numbers of channels in the same form.

Keras pads before a strided convolution by one pixel more at the end than at the start, torch the
other way round: the networks are Keras' turned by 180 degrees, kernel by kernel.

Legend: B batch, C channels, H rows, W columns, Z noise, F features.
"""

from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.gan_initial_values import glorot_uniform, normal
from modules.gan_layers import Conv2d, ConvTranspose2d, Discriminator, Embedding, Generator, Linear
from modules.gan_norms import BatchNorm
from modules.gan_presets import DCGANShape, form_of

# By resolution: pixels a side where the generator starts, its channels and the strides of the
# layers between them, and the discriminator's channels, with stride 2 each.
_FORMS = {
    28: (7, (256, 128, 64), (1, 2), (64, 128)),
    32: (4, (512, 256, 128), (2, 2), (128, 256, 512)),
    64: (4, (1024, 512, 256, 128), (2, 2, 2), (128, 256, 512, 1024)),
}
KERNEL = 5
LEAK = 0.3
"""Slope of LeakyReLU below 0, Keras' default."""
Norm = partial(BatchNorm, momentum=0.01, epsilon=1e-3)
"""With Keras' defaults; its moving variance is of a batch, torch's what that estimates."""


class UpBlock(nn.Module):
    """A transposed convolution, batch norm and LeakyReLU.

    Args:
        shape: Of the network.
        inputs: C of the input.
        outputs: C of the output.
        stride: How much larger H and W become.
    """

    def __init__(self, shape: DCGANShape, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv = ConvTranspose2d(inputs, outputs, KERNEL, stride=stride, draw=glorot_uniform)
        self.norm = Norm(outputs, is_normalising=shape.norm == "batch")

    def forward(self, x: Tensor) -> Tensor:
        """Transform `x` [B, C, H, W]."""
        return F.leaky_relu(self.norm(self.conv(x)), LEAK)


class DownBlock(nn.Module):
    """A convolution with stride 2, LeakyReLU and dropout.

    Args:
        shape: Of the network.
        inputs: C of the input.
        outputs: C of the output.
    """

    def __init__(self, shape: DCGANShape, inputs: int, outputs: int):
        super().__init__()
        self.conv = Conv2d(inputs, outputs, KERNEL, stride=2, has_bias=True, draw=glorot_uniform)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Transform `x` [B, C, H, W]."""
        return self.dropout(F.leaky_relu(self.conv(x), LEAK))


class DCGANGenerator(Generator):
    """Noise to images within [-1, 1]; a label's vector, as long as the noise, is appended to it.

    What a class is then follows Mirza and Osindero 2014 (arXiv 1411.1784), with learned vectors.
    """

    def _build(
        self, shape: DCGANShape, resolution: int, channels: int, num_classes: int | None
    ) -> None:
        self.start, widths, strides, _ = form_of(_FORMS, resolution, "a DCGAN has layers")
        widths, inputs = [shape.scaled(width) for width in widths], shape.noise_size
        self.noise_size = shape.noise_size
        if num_classes is not None:
            self.embedding = Embedding(num_classes, shape.noise_size, draw=normal)
            inputs += shape.noise_size
        features = widths[0] * self.start**2
        self.dense = Linear(inputs, features, has_bias=False, draw=glorot_uniform)
        self.norm = Norm(features, is_normalising=shape.norm == "batch")
        self.layers = nn.ModuleList(
            UpBlock(shape, *pair, stride)
            for pair, stride in zip(pairwise(widths), strides, strict=True)
        )
        self.output = ConvTranspose2d(widths[-1], channels, KERNEL, stride=2, draw=glorot_uniform)

    def _make(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        if labels is not None:
            noise = torch.cat([noise, self.embedding(labels, noise.dtype)], dim=1)
        x = F.leaky_relu(self.norm(self.dense(noise)), LEAK)  # [B, F]
        x = x.unflatten(1, (-1, self.start, self.start))  # [B, C, H, W]
        for layer in self.layers:
            x = layer(x)
        return torch.tanh(self.output(x))


class DCGANDiscriminator(Discriminator):
    """Images to logits; a label's vector is compared with the last features."""

    def _build(
        self, shape: DCGANShape, resolution: int, channels: int, num_classes: int | None
    ) -> None:
        _, _, _, widths = form_of(_FORMS, resolution, "a DCGAN has layers")
        widths = [channels, *(shape.scaled(width) for width in widths)]
        self.layers = nn.ModuleList(DownBlock(shape, *pair) for pair in pairwise(widths))
        features = widths[-1] * (resolution >> len(self.layers)) ** 2
        self.dense = Linear(features, 1, has_bias=True, draw=glorot_uniform)
        if num_classes is not None:
            self.embedding = Embedding(num_classes, features, draw=glorot_uniform)

    def _judge(self, images: Tensor, labels: Tensor | None) -> Tensor:
        x = images
        for layer in self.layers:
            x = layer(x)
        return self._project(x.flatten(1), labels)
