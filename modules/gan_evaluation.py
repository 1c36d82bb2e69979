"""How a GAN is scored, shown and exported; `modules.gan` has how it is trained."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from lightning import LightningModule
from torch import Tensor, nn

from datamodules.batch import CountedImageBatch
from modules.gan_average import MovingAverage
from modules.gan_layers import Generator
from modules.gan_pictures import num_compared, tile
from modules.gan_scores import ImageScores
from modules.keyed_draws import evaluation_keys


class EvaluatedGAN(LightningModule):
    """What evaluations, pictures and exports need: all of it is made by the moving average.

    Attributes:
        generator: The network that is trained.
        ema: Its moving average.
        scores: What real images and the average's are compared by.
        picture_settings: Of `modules.gan_pictures.drawings`.
        num_classes: Of a conditional generator, else None.
        seed: Of what is drawn.
        starts_anew: What `init_from` leaves alone: a classifier is of a run's own images.
    """

    generator: Generator
    ema: MovingAverage
    scores: ImageScores
    picture_settings: Mapping[str, Any]
    num_classes: int | None
    seed: int
    starts_anew = ("scores.", "augmentation.")
    _neighbours: Tensor | None = None

    def on_validation_start(self) -> None:
        """Have features to compare by, trained on the spot where none are given."""
        self._prepare_scores("val")

    def on_test_start(self) -> None:
        """As `on_validation_start`."""
        self._prepare_scores("test")

    def _prepare_scores(self, split: Literal["val", "test"]) -> None:
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        sample = partial(datamodule.some, "train")
        self.scores.prepare(split, sample, self.trainer.strategy.broadcast)
        self._share_statistics()

    def _share_statistics(self) -> None:
        """Score one network: ranks may have statistics of their own batches; rank 0's are saved."""
        names = [name for name, _ in self.generator.named_buffers()]
        statistics = {name: self.ema.network.get_buffer(name).cpu() for name in names}
        for name, value in self.trainer.strategy.broadcast(statistics).items():
            self.ema.network.get_buffer(name).copy_(value)

    def validation_step(self, batch: CountedImageBatch, batch_idx: int) -> None:
        """Compare real images with as many of the average's, the same on any number of ranks."""
        world_size, rank = self.trainer.world_size, self.trainer.global_rank
        counted, rows = batch["counted"], torch.arange(len(batch["images"]), device=self.device)
        positions = (batch_idx * len(rows) + rows) * world_size + rank
        labels = None if self.num_classes is None else batch.get("labels")
        labels = None if labels is None else labels[counted]
        keys = evaluation_keys(self.seed, positions[counted])
        self.scores.update(batch["images"][counted], is_real=True)
        self.scores.update(self.ema.imagine(keys, labels), is_real=False)

    def test_step(self, batch: CountedImageBatch, batch_idx: int) -> None:
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

    def pictures(self) -> dict[str, Callable[[], Any]]:
        """Give by name what draws pictures of the average as it is now, on any thread."""
        return self.ema.pictures(self.picture_settings, self._real_images)

    def _real_images(self) -> Tensor:
        """Training images among which neighbours are looked for, read once."""
        images = self._neighbours
        if images is None:
            datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            one, _ = datamodule.some("train", 1)
            columns = self.picture_settings["neighbours"]["columns"]
            images, _ = datamodule.some("train", num_compared(one.nbytes, columns))
            self._neighbours = images
        return images

    def synthesize(self, numbers: range, **settings: Any) -> Tensor:
        """Make images of the average, as `MovingAverage.synthesize`."""
        return self.ema.synthesize(numbers, **settings)

    def tile(self, images: Tensor) -> Any:
        """Lay images, uint8 [n, C, H, W], out as a picture, uint8 [height, width, 3]."""
        return tile(images)

    @property
    def generated(self) -> ImageScores:
        """How scores were computed, for whoever reports them."""
        return self.scores

    @property
    def exports(self) -> dict[str, nn.Module]:
        """Networks that leave by `launch.export`."""
        return {"generator": self.generator, "ema": self.ema.network}
