"""Samples of what the model makes, during training."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from trainers.metrics import StampedLogger


class Previews(Callback):
    """Writes the rows of the module's `preview(tokenizer)` after every validation.

    A row is a dictionary of strings (for text `prompt` and `text`). They go to
    `samples/step-<step>.jsonl` in the run directory, and as a table to the run's loggers. A
    module without `preview` has no samples.
    """

    def __init__(self, directory: str | Path):
        """Take the directory to write to."""
        self.directory = Path(directory)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write this step's samples, on rank zero; all ranks make them where each has shards."""
        preview = getattr(pl_module, "preview", None)
        if preview is None or trainer.state.fn != "fit":
            return
        strategy: Any = trainer.strategy
        if not (trainer.is_global_zero or strategy.shards_parameters):
            return
        with trainer.precision_plugin.forward_context():
            rows = preview(trainer.datamodule.tokenizer)  # type: ignore[attr-defined]
        if not trainer.is_global_zero:
            return
        self.directory.mkdir(exist_ok=True)
        path = self.directory / f"step-{trainer.global_step:08d}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        for logger in trainer.loggers:
            if isinstance(logger, StampedLogger):
                logger.log_table("samples_table", rows)
