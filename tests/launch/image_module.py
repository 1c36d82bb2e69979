"""A module of an image family, as far as the verbs can tell."""

import numpy as np
import torch
from lightning import LightningModule
from torch import Tensor, nn


class ImageModule(LightningModule):
    """Generates images of one shade: the seed, and of some classes these in turn."""

    def __init__(self, *, optimizer: dict):
        super().__init__()
        self.generator, self.ema = nn.Linear(2, 3), nn.Linear(2, 3)
        self.ema.weight = self.generator.weight  # shared, which a file cannot be

    @property
    def exports(self) -> dict[str, nn.Module]:
        """Two networks by name."""
        return {"generator": self.generator, "ema": self.ema}

    def synthesize(
        self, numbers: range, *, seed: int, truncation: float, classes: list[int] | None
    ) -> Tensor:
        """Give uint8 [n, 1, 4, 4], at most 64."""
        assert len(numbers) <= 64
        labels = torch.tensor(classes or [0])[torch.tensor(numbers) % len(classes or [0])]
        shades = seed + 10 * labels + int(100 * truncation)
        return shades.byte().view(-1, 1, 1, 1).expand(-1, 1, 4, 4)

    def tile(self, images: Tensor) -> np.ndarray:
        """Put images beside each other."""
        return images.permute(2, 0, 3, 1).reshape(4, -1, 1).repeat(1, 1, 3).numpy()
