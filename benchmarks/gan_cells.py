"""The GANs of `benchmarks.cells`: each loss and penalty once, on networks of each kind.

Without batch norm and dropout, which differ by rank.
"""

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 32  # rows and columns of the images
_DCGAN = ["module.preset=dcgan_tiny", "datamodule.resolution=28"]
_DCGAN += ["module.network={norm: none, dropout: 0.0}"]
_SNGAN = ["module.preset=sngan_tiny", "datamodule.resolution=32", "module.network.norm=none"]
_R3GAN = ["module.preset=r3gan_tiny", "datamodule.resolution=8"]

GANS = {
    "gan": [*_DCGAN, "module.conditional=true", "module.penalty.r1=0.5"],
    "gan_saturating": [
        *_DCGAN,
        "module.loss={name: saturating, one_noise: false}",
        "module.penalty={r1: 0.5, every_steps: 2}",
    ],
    "gan_hinge": [*_SNGAN, "module.loss.name=hinge", "module.conditional=true"],
    "gan_least_squares": [
        *_DCGAN,
        "module.loss.name=least_squares",
        "module.augmentation.name=diffaugment",
    ],
    "gan_wasserstein": [
        *_DCGAN,
        "module.loss={name: wasserstein, generator_every: 2}",
        "module.penalty.gradient=10",
    ],
    "gan_relativistic": [
        *_R3GAN,
        "module.loss={name: relativistic, one_noise: false}",
        "module.penalty={r1: 0.5, r2: 0.5}",
        "module.augmentation.name=adaptive",
        "module.augmentation.probability={target: 0.2, speed_images: 200, interval_steps: 2}",
    ],
}
"""Overrides by the name that cells have for them."""
COMMON = [
    "module=gan",
    "datamodule=images",
    "corpus=images",
    "corpus.format=raw",
    "corpus.num_processes=1",  # starting others takes longer
    "datamodule.channels=1",
    "datamodule.num_workers=0",
    "datamodule.eval_images=4",
    "module.pictures={grid: {rows: 1, columns: 2}, interpolation: null, truncation: null, "
    "classes: null, neighbours: null}",
    "module.scores.extractor.training_steps=1",
    "module.ema={half_life_images: 32, ramp_up: null}",
]


def write_images(folder: Path) -> None:
    """Write images of two kinds, one of them striped, into a folder for each."""
    draw = np.random.default_rng(0)
    for number in range(120):
        kind = number % 2
        pixels = draw.integers(0, 256, (SIZE, SIZE), np.uint8)
        pixels[:, :: 2 + kind] //= 2 + 2 * kind
        path = folder / f"kind{kind}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
