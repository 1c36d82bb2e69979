"""What a run's strategy says its weights are, kept beside its checkpoints."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import save_file

GATHERED = "+trainer.callbacks.gathered={_target_: tests.launch.gathered_weights.GatheredWeights}"
"""Override that adds it to a run."""


class GatheredWeights(Callback):
    """Writes the whole fp32 values of all parameters and buffers when the run ends."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather them, one at a time, on all ranks."""
        strategy: Any = trainer.strategy
        strategy.release_weights()
        values = {
            name: strategy.whole(value).detach().cpu().clone()
            for name, value in pl_module.state_dict(keep_vars=True).items()
        }
        if trainer.is_global_zero:
            save_file(values, Path(trainer.default_root_dir) / "gathered.safetensors")
