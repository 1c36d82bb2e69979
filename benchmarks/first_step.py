"""What both sides of `benchmarks.startup` do after the first step: note the time, and end."""

import os
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class NoteFirstStep(Callback):
    """Writes the time after the first optimizer step, on rank 0, and ends all ranks there.

    Args:
        note: The file to write to: seconds since the epoch.
    """

    def __init__(self, note: str):
        self.note = Path(note)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note it; without the ends of a run, which are not what is measured."""
        assert trainer.global_step == 1
        if trainer.is_global_zero:
            self.note.write_text(str(time.time()))
        trainer.strategy.barrier()  # no rank may leave before the others have taken it
        os._exit(0)
