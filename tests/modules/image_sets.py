"""Images to score: handwritten digits, noise, and features that need no network."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def digits(resolution: int) -> tuple[Tensor, Tensor]:
    """All 1797 digits, shuffled: images uint8 [N, 1, H, W] and labels int64 [N]."""
    from sklearn.datasets import load_digits  # takes a second

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) * 255 / 16
    images = F.interpolate(images, size=(resolution, resolution), mode="bilinear")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images.round().byte()[order], torch.tensor(data.target, dtype=torch.int64)[order]


def noise(num_images: int, *size: int, seed: int = 0, top: int = 256) -> Tensor:
    """Images uint8 [num_images, *size] of nothing, from 0 to below `top`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(top, (num_images, *size), generator=generator, dtype=torch.uint8)


class Pixels(nn.Module):
    """The features of an image are its pixels."""

    name = "pixels"

    def __init__(self, num_features: int, *, is_inception: bool = False):
        super().__init__()
        self.num_features, self.is_inception = num_features, is_inception
        self.num_seen = 0

    def forward(self, images: Tensor) -> Tensor:
        """Flatten `images`."""
        self.num_seen += len(images)
        return images.flatten(1).float() / 255
