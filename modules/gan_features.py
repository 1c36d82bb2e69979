"""What images are compared by: features of a pretrained network, or of a classifier made here.

Legend: N images, C channels, H rows, W columns, F features, K classes.
"""

import warnings
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.gan_average import to_floats

_MAX_RESOLUTION = (
    64  # what is larger the classifier sees averaged down: it is to be made in seconds
)
_WIDTHS = (16, 32, 64, 64, 64)  # of its convolutions; all but the first halve the image
_NUM_FEATURES = _WIDTHS[-1]
_NUM_ROTATIONS = 4
_BATCH, _LR = 64, 2e-3
_IMAGES_AT_ONCE = 256  # of the pass that measures the features' scale


class Features(Protocol):
    """What `modules.gan_scores.ImageScores` needs of an `nn.Module` that is its `extractor`.

    One that also has `training_images`, a buffer `is_trained` and `train_on(images, labels)` is
    trained on as many images of the training data before the first evaluation.
    """

    num_features: int
    """F."""
    is_inception: bool
    """Whether these are the features of Inception that FID and KID are defined by."""

    @property
    def name(self) -> str:
        """For signatures."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """Turn `images` (uint8 [N, C, H, W]) into features (fp32 [N, F])."""
        ...


class TorchScriptFeatures(nn.Module):
    """Features of a network in a TorchScript file, such as NVIDIA's `inception-2015-12-05.pt`.

    It is called with uint8 images of three channels, and with `return_features=True` where it has
    such an argument. Its weights stay out of checkpoints.

    Args:
        path: The file.
        num_features: F.
        is_inception: Whether it is the Inception that FID and KID are defined by.

    Raises:
        ValueError: There is no such file, or it is none of TorchScript.
    """

    def __init__(self, *, path: str, num_features: int, is_inception: bool):
        super().__init__()
        self.name, self.num_features, self.is_inception = (
            Path(path).stem,
            num_features,
            is_inception,
        )
        if not Path(path).is_file():
            raise ValueError(
                f"module.scores.extractor.path={path} -> no such file -> mend the path, or use "
                "modules.gan_features.ClassifierFeatures, which needs none"
            )
        try:
            with warnings.catch_warnings():  # a deprecated format, and that of published Inceptions
                warnings.filterwarnings("ignore", category=DeprecationWarning)
                network = torch.jit.load(path, map_location="cpu").eval()
        except RuntimeError as error:
            raise ValueError(
                f"module.scores.extractor.path={path} -> it is no TorchScript file "
                f"({str(error).partition('. ')[0]}) -> save the network by torch.jit.save"
            ) from error
        self._network = (network,)  # no submodule: it would be part of every checkpoint
        names = [argument.name for argument in network.forward.schema.arguments]
        self._options = {"return_features": True} if "return_features" in names else {}

    def forward(self, images: Tensor) -> Tensor:
        """Compute features (fp32 [N, F]) of `images` (uint8 [N, 1 or 3, H, W])."""
        network = self._network[0].to(images.device)
        rgb = images.expand(-1, 3, -1, -1).contiguous()
        return network(rgb, **self._options).float()


class ClassifierFeatures(nn.Module):
    """Features of a small convolutional network, trained on the run's own images.

    It learns to tell labels apart, or where there are none, by how many quarter turns an image is
    rotated (Gidaris et al. 2018, arXiv 1803.07728). The features are those before its last layer,
    over their root mean square on the training images, so that distances of runs have one scale.
    Distances between them are no FID: they compare runs on the same data with the same classifier.

    Its weights are buffers: no optimizer has them, and every checkpoint does, so that scores after
    a resume are of the same features.

    Args:
        channels: C.
        resolution: H and W. Above 64 the classifier sees images averaged down to that.
        num_classes: K; None: rotations.
        training_images: How many to train on, at most.
        training_steps: Of 64 images each; after 300, some seconds, 96 % of handwritten digits that
            it has not seen are right.
        seed: Of its initial values and of the order of its training images.
    """

    is_inception = False
    num_features = _NUM_FEATURES
    is_trained: Tensor
    feature_scale: Tensor

    def __init__(
        self,
        *,
        channels: int,
        resolution: int,
        num_classes: int | None,
        training_images: int,
        training_steps: int,
        seed: int,
    ):
        super().__init__()
        self.size, self.num_classes = min(resolution, _MAX_RESOLUTION), num_classes
        self.training_images, self.seed = training_images, seed
        self.training_steps = training_steps
        # As many as halve an image to 4 x 4, and two of smaller ones.
        halvings = max(2, min(len(_WIDTHS) - 1, (self.size - 1).bit_length() - 2))
        widths = (*_WIDTHS[:halvings], _NUM_FEATURES)
        for layer, (inputs, outputs) in enumerate(zip((channels, *widths), widths, strict=False)):
            self.register_buffer(f"weight{layer}", torch.zeros(outputs, inputs, 3, 3))
            self.register_buffer(f"bias{layer}", torch.zeros(outputs))
        self.num_layers = len(widths)
        self.register_buffer("head", torch.zeros(num_classes or _NUM_ROTATIONS, _NUM_FEATURES))
        self.register_buffer("feature_scale", torch.ones(()))
        self.register_buffer("is_trained", torch.tensor(False))

    @property
    def name(self) -> str:
        """What it was trained on and how, and a digest of what came of it.

        Scores compare where all of it is equal; other hardware gives nearly the same weights.
        """
        digest = sha256()
        for buffer in self.buffers():
            digest.update(buffer.cpu().numpy().tobytes())
        what = f"{self.num_classes}-labels" if self.num_classes else "turns"
        return (
            f"classifier-of-{what}|images:{self.training_images}|steps:{self.training_steps}|"
            f"seed:{self.seed}|weights:{digest.hexdigest()[:8]}"
        )

    def forward(self, images: Tensor) -> Tensor:
        """Compute features (fp32 [N, F]) of `images` (uint8 [N, C, H, W])."""
        return self._features(images, dict(self.named_buffers())) / self.feature_scale

    def classify(self, images: Tensor) -> Tensor:
        """Compute the logits (fp32 [N, K], or of the four rotations) of `images`."""
        buffers = dict(self.named_buffers())
        return F.linear(self._features(images, buffers), buffers["head"])

    def train_on(self, images: Tensor, labels: Tensor | None) -> None:
        """Learn from training images.

        On the CPU, in fp32, with draws of its own: the same weights whatever device, precision and
        random state the run has.

        Args:
            images: uint8 [N, C, H, W].
            labels: int64 [N]; needed where there are classes.

        Raises:
            ValueError: There are classes and no labels.
        """
        if self.num_classes and labels is None:
            raise ValueError(
                f"module.scores.extractor.num_classes={self.num_classes} -> the data has no labels "
                "-> set it to null: the classifier then learns rotations"
            )
        # A validation is in inference mode, whose tensors no gradient goes through.
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            images = images.cpu().clone()
            labels = labels.cpu().clone() if labels is not None else None
            weights = self._learn(images, labels)
            with torch.no_grad():
                chunks = images.split(_IMAGES_AT_ONCE)
                features = torch.cat([self._features(chunk, weights) for chunk in chunks])
                for name, weight in weights.items():
                    self.get_buffer(name).copy_(weight)
                self.feature_scale.copy_(features.square().mean().sqrt())
                self.is_trained.fill_(True)

    def _learn(self, images: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        weights = self._initial_weights(generator)
        optimizer = torch.optim.Adam(weights.values(), lr=_LR)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.training_steps)
        for _ in range(self.training_steps):
            chosen = torch.randint(len(images), (_BATCH,), generator=generator)
            batch = images[chosen]
            if self.num_classes and labels is not None:
                targets = labels[chosen]
            else:
                targets = torch.randint(_NUM_ROTATIONS, (_BATCH,), generator=generator)
                turned = [torch.rot90(batch, turns, (2, 3)) for turns in range(_NUM_ROTATIONS)]
                batch = torch.stack(turned)[targets, torch.arange(_BATCH)]
            loss = F.cross_entropy(
                F.linear(self._features(batch, weights), weights["head"]), targets
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return weights

    def _initial_weights(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw N(0, 2 / inputs) (He et al. 2015, arXiv 1502.01852, eq. 10); biases are zero."""
        weights = {}
        for name, buffer in self.named_buffers():
            if name.startswith(("weight", "head")):
                std = (2 / buffer[0].numel()) ** 0.5
                weights[name] = torch.randn(buffer.shape, generator=generator) * std
            elif name.startswith("bias"):
                weights[name] = torch.zeros(buffer.shape)
        return {name: weight.requires_grad_() for name, weight in weights.items()}

    def _features(self, images: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        x = to_floats(images)  # [N, C, H, W]
        if x.size(-1) != self.size:
            x = F.interpolate(x, size=(self.size, self.size), mode="area")
        for layer in range(self.num_layers):
            weight, bias = weights[f"weight{layer}"], weights[f"bias{layer}"]
            x = F.relu(F.conv2d(x, weight, bias, stride=2 if layer else 1, padding=1))
        return x.mean((2, 3))  # [N, F]
