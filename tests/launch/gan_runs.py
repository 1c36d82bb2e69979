"""What tests of GAN runs share: all that a run leaves, to compare two of them by."""

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path, tree_map_only

from launch.run_directory import RunDirectory
from trainers.checkpoint import load_weights, open_checkpoint
from trainers.metrics import read_metrics
from trainers.stored_tensors import Stored

STATEFUL = [
    "module.network={norm: batch, dropout: 0.3, width_factor: null}",
    "module.conditional=true",
    "module.loss.generator_every=2",
    "module.penalty={r1: 0.5, every_steps: 3}",
    "module.augmentation.name=adaptive",
    "module.augmentation.probability={target: 0.1, speed_images: 200, interval_steps: 4}",
    "module.ema={half_life_images: 60, ramp_up: 0.5}",
    "module.optimizer.lr={start: 0.002, end: 0.001, images: null, shape: cosine}",
]
"""Overrides of a GAN with all that has a state: statistics, dropout, an average, augmentation."""


class Hold(Callback):
    """Keeps a launch that begins with the first step at another, for whoever is to kill it."""

    def __init__(self, step: int):
        self.step = step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let one that continues go on."""
        self.holds = trainer.global_step == 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Wait until it is killed."""
        if self.holds and batch_idx + 1 == self.step:
            time.sleep(600)


def _last(run: RunDirectory) -> Path:
    path = run.find_checkpoint("last")
    assert path is not None
    return path


def weights(run: RunDirectory) -> dict[str, Tensor]:
    """Parameters and buffers of the run's last checkpoint."""
    return load_weights(_last(run))


def optimizers(run: RunDirectory) -> list[Any]:
    """States of the optimizers in it."""
    states = open_checkpoint(_last(run)).optimizer_states
    return tree_map_only(Stored, Stored.whole, states)


def rows(run: RunDirectory) -> list[dict[str, Any]]:
    """All that was logged but for times."""
    return [
        {k: v for k, v in row.items() if not k.startswith(("perf/", "data/"))}
        for row in read_metrics(run.path / "metrics.jsonl")
    ]


def differing(one: RunDirectory, other: RunDirectory) -> set[str]:
    """What two runs do not have in common to the bit: weights by name, `optimizers`, `rows`."""
    mine, theirs = weights(one), weights(other)
    found = {name for name in mine if not torch.equal(mine[name], theirs[name])}
    found |= mine.keys() ^ theirs.keys()
    here, there = (dict(tree_flatten_with_path(optimizers(run))[0]) for run in (one, other))
    if here.keys() != there.keys() or not all(_is_same(here[k], there[k]) for k in here):
        found.add("optimizers")
    return found | ({"rows"} if rows(one) != rows(other) else set())


def _is_same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other
