"""All ranks start from the same configuration and the same checkpoint."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class SameStart(Callback):
    """Compares a hash of every rank's configuration and resume step before the first step.

    Ranks that somebody else started (torchrun, srun) have composed for themselves; one that was
    given other overrides, or sees another file system, would train silently wrong.
    """

    def __init__(self, config: Mapping[str, Any], *, resume_step: int):
        """Hash what must agree."""
        text = json.dumps([config, resume_step], sort_keys=True, default=str)
        digest = hashlib.blake2b(text.encode(), digest_size=7).digest()
        self.value = int.from_bytes(digest, "little")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare over the process group.

        Raises:
            ValueError: A rank differs.
        """
        mine = torch.tensor([self.value], device=trainer.strategy.root_device)
        everyone = trainer.strategy.all_gather(mine).flatten().tolist()
        odd = [rank for rank, value in enumerate(everyone) if value != everyone[0]]
        if odd:
            raise ValueError(
                f"rank(s) {odd} -> their configuration or their newest checkpoint differs from "
                f"rank 0's -> give every rank the same overrides and a runs_dir they all share"
            )
