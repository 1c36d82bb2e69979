"""The program of the ranks of `test_gan_scores.py`: scores of images that ranks share unevenly."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from modules.gan_features import ClassifierFeatures
from modules.gan_scores import ImageScores
from tests.modules.image_sets import Pixels, noise

REAL, GENERATED = noise(31, 1, 2, 2), noise(23, 1, 2, 2, seed=1, top=200)
SHARES = {"uneven": (slice(0, 9), slice(9, None)), "one has none": (slice(0, 0), slice(0, None))}


def broadcast(value: Any) -> Any:
    """Give what rank 0 has."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def sample(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Give training images, to rank 0 alone."""
    assert dist.get_rank() == 0
    return noise(count, 1, 8, 8), torch.arange(count) % 10


def main(out: Path) -> None:
    """Score twice for each share, so that real images come from the evaluation before."""
    dist.init_process_group("gloo")
    rank, found = int(os.environ["RANK"]), {}
    for name, shares in SHARES.items():
        scores = ImageScores(Pixels(4))
        scores.prepare("val", sample, broadcast)
        found[name] = []
        for _ in range(2):
            scores.update(REAL[shares[rank]], is_real=True)
            scores.update(GENERATED[shares[rank]], is_real=False)
            found[name].append(scores.compute())
            scores.reset()
        found["signatures"] = scores.signatures
    classifier = ClassifierFeatures(
        channels=1, resolution=8, num_classes=10, training_images=300, training_steps=30, seed=rank
    )
    ImageScores(classifier).prepare("val", sample, broadcast)
    found["classifier"] = classifier(REAL).sum().item()
    (out / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
