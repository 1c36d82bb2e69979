"""Images for GANs: a corpus as a LightningDataModule whose stream resumes at the next image."""

from typing import Any

import torch
from torch import Tensor

from datamodules.corpus_stream import CorpusDataModule
from datamodules.facts import IMAGES, PreparedData
from datamodules.image_codec import NO_RESIZE, ImageCodec
from datamodules.image_files import FILTERS
from datamodules.index import Index
from datamodules.loader import EvaluationLoader
from datamodules.samples import StoredSamples
from datamodules.settings import check_choice


class ImageDataModule(CorpusDataModule):
    """Images of a corpus as `datamodules.batch.ImageBatch`, with labels where it has any.

    Args:
        resolution: rows and columns of images.
        channels: 1 of grey or 3 of colour.
        resize: filter for the central square of images that are stored in another size: `bilinear`,
            `bicubic`, `lanczos` or `box`; `none` refuses data that holds such.
        flip: mirror half of the images of training, others in each epoch.
        eval_images: images per rank and forward in evaluation.
        corpus_stream: the rest, as in `datamodules.corpus_stream.CorpusDataModule`.
    """

    kind = IMAGES

    def __init__(
        self,
        *,
        resolution: int,
        channels: int,
        resize: str,
        flip: bool,
        eval_images: int,
        **corpus_stream: Any,
    ) -> None:
        super().__init__(**corpus_stream)
        check_choice("resize", resize, [NO_RESIZE, *FILTERS])
        check_choice("channels", channels, [1, 3])
        check_choice("flip", flip, [True, False])
        for key, value in {"resolution": resolution, "eval_images": eval_images}.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(
                    f"datamodule.{key}={value} -> it is a whole number -> use 1 or more"
                )
        if self._tail == "pad_mask":
            raise ValueError(
                "datamodule.tail=pad_mask -> the images of a step that is filled up would weigh "
                "more than those of others -> use drop or carry"
            )
        self._resolution, self._channels, self._resize = resolution, channels, resize
        self._flip, self._eval_images = flip, eval_images

    @property
    def eval_micro_batch(self) -> int:
        """Images per rank and forward in evaluation."""
        return self._eval_images

    def check_data(self, prepared: PreparedData) -> None:
        """Refuse data of another kind, size or number of channels.

        Raises:
            ValueError: it is of one of them.
        """
        super().check_data(prepared)
        if (found := prepared.facts["channels"]) != self._channels:
            raise ValueError(
                f"datamodule.channels={self._channels} -> the images in {prepared.path} have "
                f"{found} -> set datamodule.channels={found}, or prepare them with "
                f"corpus.channels={self._channels}"
            )
        size = prepared.facts["resolution"]
        if self._resize == NO_RESIZE and set(size.values()) != {self._resolution}:
            raise ValueError(
                f"datamodule.resolution={self._resolution} -> the images in {prepared.path} have "
                f"{size['min_height']} to {size['max_height']} rows and {size['min_width']} to "
                f"{size['max_width']} columns -> prepare them with corpus.resolution="
                f"{self._resolution}, or set datamodule.resize to one of {', '.join(FILTERS)}"
            )

    def samples_of(self, split: str, index: Index) -> StoredSamples:
        """Give the images of a data set."""
        codec = ImageCodec(
            resolution=self._resolution,
            channels=self._channels,
            resize=self._resize,
            flip=self._flip,
            num_classes=self.facts["num_classes"],
        )
        return StoredSamples(
            index,
            codec,
            seed=self._seed,
            bad_samples=self.bad_samples,
            cache=self.cache_for(index),
        )

    def some(self, split: str, count: int) -> tuple[Tensor, Tensor | None]:
        """Give images that are evenly spread over a split, as evaluation sees them.

        Args:
            split: name of the split.
            count: of images, at most; a smaller split is taken whole.

        Returns:
            uint8 [n, C, H, W], and their labels, int64 [n], None where the data has none.

        Raises:
            ValueError: there is no such split.
        """
        loader = EvaluationLoader(
            self.source(split),
            micro_batch=min(count, self._eval_images),
            max_samples=count,
            rank=0,
            world_size=1,
        )
        batches = list(loader)
        found = {
            name: torch.cat([batch[name] for batch in batches])[: loader.num_samples]
            for name in ("images", "labels")
            if name in batches[0]
        }
        return found["images"], found.get("labels")
