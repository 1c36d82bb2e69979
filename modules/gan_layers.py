"""Layers of the GAN family's networks: convolutions, linear maps and tables; their base classes.

Each computes in the dtype of its input and casts its weights to it, since a strategy may keep them
in low precision while a penalty on gradients is computed in fp32. All can be differentiated twice.

Legend: B batch, C channels, H rows, W columns, K classes, Z noise, F features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.gan_initial_values import Draw, zeros
from modules.gan_norms import SpectralNorm
from modules.initial_values import generator_for


class Weighted(nn.Module):
    """Base of the layers that have a `weight`, perhaps a `bias`, and perhaps spectral norm.

    Args:
        size: Of `weight`, outputs first.
        num_biases: Size of `bias`, which starts at 0; 0: there is none.
        draw: Initial values of `weight`.
        is_spectral: Whether `weight` is divided by its largest singular value.
    """

    bias: nn.Parameter | None

    def __init__(self, *size: int, num_biases: int = 0, draw: Draw, is_spectral: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(num_biases)) if num_biases else None
        self.spectral_norm = SpectralNorm(self.weight.shape) if is_spectral else None
        self.draws: dict[str, Draw] = {"weight": draw, "bias": zeros}

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """What to compute with in `dtype`: the weight, normalised, and the bias."""
        weight = self.weight if self.spectral_norm is None else self.spectral_norm(self.weight)
        return weight.to(dtype), None if self.bias is None else self.bias.to(dtype)


def at_least_fp32(features: Tensor) -> Tensor:
    """What logits are computed of, outside of autocast: their differences are small."""
    return features.to(torch.promote_types(features.dtype, torch.float32))


class Linear(Weighted):
    """A linear map of [B, inputs] to [B, outputs].

    Args:
        inputs: Size of a sample.
        outputs: Size of a result.
        has_bias: Whether something is added.
        draw: As `Weighted`.
        is_spectral: As `Weighted`.
    """

    def __init__(
        self, inputs: int, outputs: int, *, has_bias: bool, draw: Draw, is_spectral: bool = False
    ):
        num_biases = outputs if has_bias else 0
        super().__init__(outputs, inputs, num_biases=num_biases, draw=draw, is_spectral=is_spectral)

    def forward(self, x: Tensor) -> Tensor:
        """Transform `x` [B, inputs]."""
        return F.linear(x, *self.weights(x.dtype))


class Embedding(Weighted):
    """A table: a vector for each of K classes.

    Args:
        num_classes: K.
        width: Size of a vector.
        draw: As `Weighted`.
        is_spectral: As `Weighted`.
    """

    def __init__(self, num_classes: int, width: int, *, draw: Draw, is_spectral: bool = False):
        super().__init__(num_classes, width, draw=draw, is_spectral=is_spectral)

    def forward(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        """Look `labels`, int64 [B], up: [B, width] in `dtype`."""
        return F.embedding(labels, self.weights(dtype)[0])


class Conv2d(Weighted):
    """A convolution with zeros around its input: half a kernel's width of them on each side.

    So that with stride 1 an odd kernel keeps H and W.

    Args:
        inputs: C of the input.
        outputs: C of the output.
        kernel: Rows and columns of the kernel.
        stride: Of the output's pixels.
        groups: Of channels, which are not mixed.
        has_bias: Whether something is added.
        draw: As `Weighted`.
        is_spectral: As `Weighted`.
        padding: Zeros on each side; None: half a kernel's width.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        has_bias: bool,
        draw: Draw,
        is_spectral: bool = False,
        padding: int | None = None,
    ):
        size, num_biases = (outputs, inputs // groups, kernel, kernel), outputs if has_bias else 0
        super().__init__(*size, num_biases=num_biases, draw=draw, is_spectral=is_spectral)
        self.stride, self.groups = stride, groups
        self.padding = kernel // 2 if padding is None else padding

    def forward(self, x: Tensor) -> Tensor:
        """Transform `x` [B, C, H, W]."""
        weight, bias = self.weights(x.dtype)
        x = x.contiguous(memory_format=torch.channels_last)  # faster, on CPU and CUDA
        return F.conv2d(x, weight, bias, self.stride, self.padding, groups=self.groups)


class ConvTranspose2d(Weighted):
    """The transpose of a convolution with an odd kernel, without bias: an image `stride` as large.

    Args:
        inputs: C of the input.
        outputs: C of the output.
        kernel: Rows and columns of the kernel.
        stride: 1 or 2.
        draw: As `Weighted`.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int, draw: Draw):
        super().__init__(inputs, outputs, kernel, kernel, draw=draw)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Transform `x` [B, C, H, W] to [B, outputs, stride H, stride W]."""
        padding = self.weight.size(-1) // 2
        weight, _ = self.weights(x.dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        return F.conv_transpose2d(x, weight, None, self.stride, padding, self.stride - 1)


class Network(nn.Module):
    """Base of generators and discriminators, which need `_build`.

    Args:
        shape: Architecture and sizes, of `gan_presets`.
        resolution: H and W.
        channels: C.
        num_classes: K, or None: unconditional.

    Raises:
        ValueError: There is no such network for the resolution.
    """

    layers: nn.ModuleList

    def __init__(self, shape: Any, *, resolution: int, channels: int, num_classes: int | None):
        super().__init__()
        self.num_classes = num_classes
        self._build(shape, resolution, channels, num_classes)

    def _build(self, shape: Any, resolution: int, channels: int, num_classes: int | None) -> None:
        """Make the layers."""
        raise NotImplementedError

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers between the first and the last, each a unit to checkpoint or shard."""
        return list(self.layers)

    def refresh(self) -> None:
        """Let the next forward in training, and it alone, follow singular values one iteration.

        For a step's first forward: all others see the same spectral norms.
        """
        for module in self.modules():
            if isinstance(module, SpectralNorm):
                module.is_due = True

    @torch.no_grad()
    def initialise(self, network: str, seed: int) -> None:
        """Set every parameter to its initial value, a function of the seed and its name alone.

        Args:
            network: What the names begin with.
            seed: Of the run.
        """
        for path, layer in self.named_modules(prefix=network):
            for name, parameter in layer.named_parameters(recurse=False):
                layer.draws[name](parameter, generator_for(f"{path}.{name}", seed))  # type: ignore
            if isinstance(layer, Weighted) and layer.spectral_norm is not None:
                layer.spectral_norm.start(layer.weight, generator_for(f"{path}.u", seed))

    def check(self, labels: Tensor | None) -> None:
        """Refuse labels that are missing or mean nothing.

        Raises:
            ValueError: They are, by `num_classes`.
        """
        if (labels is None) == (self.num_classes is None):
            return
        if labels is None:
            raise ValueError(
                "module.conditional=true -> no labels were given to a conditional network -> pass "
                f"those of its {self.num_classes} classes, or set it to false"
            )
        raise ValueError(
            "module.conditional=false -> labels were given to an unconditional network -> pass "
            "none, or set it to true"
        )


class Generator(Network):
    """Base of generators, which need `_make`.

    Attributes:
        noise_size: Z.
    """

    noise_size: int

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """Make images.

        Args:
            noise: [B, Z].
            labels: int64 [B], or None where the network is unconditional.

        Returns:
            [B, C, H, W], black at -1 and white at 1.

        Raises:
            ValueError: As `check`.
        """
        self.check(labels)
        return self._make(noise, labels)

    def _make(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        raise NotImplementedError


class Discriminator(Network):
    """Base of discriminators, which need `_judge`."""

    dense: Linear
    embedding: Embedding

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Judge images.

        Args:
            images: [B, C, H, W].
            labels: int64 [B], or None where the network is unconditional.

        Returns:
            Logits [B], of at least fp32.

        Raises:
            ValueError: As `check`.
        """
        self.check(labels)
        return self._judge(images, labels)

    def _judge(self, images: Tensor, labels: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _project(self, features: Tensor, labels: Tensor | None) -> Tensor:
        """Logits [B] of features [B, F]: `dense` of them, plus their product with a label's vector.

        Miyato and Koyama 2018, arXiv 1802.05637, equation 3.
        """
        with torch.autocast(features.device.type, enabled=False):
            features = at_least_fp32(features)
            logits = self.dense(features).sum(1)  # no view: FSDP2 warns of one
            if labels is None:
                return logits
            return logits + (self.embedding(labels, features.dtype) * features).sum(1)
