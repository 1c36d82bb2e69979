"""How a GAN is scored, shown and exported; `modules.gan` has how it is trained."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from lightning import LightningModule
from torch import Tensor, nn

from datamodules.batch import ImageBatch
from modules.gan_average import MovingAverage
from modules.gan_scores import ImageScores
from modules.keyed_draws import evaluation_keys


class EvaluatedGAN(LightningModule):
    """What evaluations, pictures and exports need: all of it is made by the moving average.

    Attributes:
        generator: The network that is trained.
        ema: Its moving average.
        scores: What real images and the average's are compared by.
        picture_settings: Of `modules.gan_pictures.draw_all`.
        num_classes: Of a conditional generator, else None.
        seed: Of what is drawn.
    """

    generator: nn.Module
    ema: MovingAverage
    scores: ImageScores
    picture_settings: Mapping[str, Any]
    num_classes: int | None
    seed: int

    def on_validation_start(self) -> None:
        """Have features to compare by, trained on the spot where none are given."""
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self.scores.prepare(partial(datamodule.some, "train"), self.trainer.strategy.broadcast)

    def on_test_start(self) -> None:
        """As `on_validation_start`."""
        self.on_validation_start()

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Compare real images with as many of the average's, the same on any number of ranks."""
        world_size, rank = self.trainer.world_size, self.trainer.global_rank
        counted, rows = batch["counted"], torch.arange(len(batch["images"]), device=self.device)
        positions = (batch_idx * len(rows) + rows) * world_size + rank
        labels = None if self.num_classes is None else batch["labels"][counted]
        keys = evaluation_keys(self.seed, positions[counted])
        self.scores.update(batch["images"][counted], is_real=True)
        self.scores.update(self.ema.imagine(keys, labels), is_real=False)

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """As `validation_step`."""
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log scores under `val/`."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log scores under `test/`."""
        self._log_scores("test")

    def _log_scores(self, split: Literal["val", "test"]) -> None:
        scores = self.scores.compute().items()
        self.scores.reset()
        # Of torch's default dtype on any device, where others are fp64; equal on all ranks already.
        values = {f"{split}/{name}": torch.tensor(value) for name, value in scores}
        self.log_dict(values, sync_dist=True)

    def pictures(self) -> Callable[[], dict[str, Any]]:
        """Give what draws pictures of the average as it is now, on any thread."""
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        return self.ema.pictures(self.picture_settings, partial(datamodule.some, "train"))

    def synthesize(self, num_images: int, **settings: Any) -> Tensor:
        """Make images of the average, as `MovingAverage.synthesize`."""
        return self.ema.synthesize(num_images, **settings)

    @property
    def exports(self) -> dict[str, nn.Module]:
        """Networks that leave by `launch.export`."""
        return {"generator": self.generator, "ema": self.ema.network}
