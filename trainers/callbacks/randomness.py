"""Randomness of a training step as a function, never as a saved generator state."""

import hashlib
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class KeyedRandomness(Callback):
    """Seeds torch before every forward pass by (seed, step, micro-batch, rank).

    Dropout is then the same after a resume as without the interruption, with nothing saved.
    """

    def __init__(self, *, seed: int):
        """Remember the run's seed."""
        self.seed = seed

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed this micro-batch's forward and backward pass."""
        micro = batch_idx % trainer.accumulate_grad_batches
        key = f"{self.seed}/{trainer.global_step}/{micro}/{trainer.global_rank}".encode()
        # 63 bits: torch takes seeds as signed integers.
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
        # Not torch.manual_seed: it formats a traceback for every device that is not in use.
        torch.default_generator.manual_seed(seed)
        if pl_module.device.type == "cuda":
            torch.cuda.manual_seed(seed)
