"""Stored images to batches.

Legend: B images of a batch, H rows, W columns, C channels.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from datamodules.batch import CountedImageBatch, ImageBatch, KeyedImageBatch
from datamodules.image_files import MEMBERS, Pixels, fit_pixels, read_pixels
from datamodules.order import hash_key, uniform

NO_RESIZE = "none"
_FLIP = hash_key(9)
"""Purpose of the draw, next to those up to `datamodules.denoising`: models draw from keys too."""


class ImageSample(NamedTuple):
    """A decoded image.

    Attributes:
        pixels: uint8 [H, W, C].
        label: number of its class; None where the data has none.
        key: of all that is random about it in this epoch; None in evaluation.
    """

    pixels: Pixels
    label: int | None
    key: np.uint64 | None


class ImageCodec:
    """From stored images to `datamodules.batch.ImageBatch`; a `datamodules.samples.Codec`.

    Args:
        resolution: H and W.
        channels: C.
        resize: filter for the central square of images of another size; `none` refuses them.
        flip: mirror half of the images of training, others in each epoch.
        num_classes: labels are below it; None: there are none.
    """

    def __init__(
        self, *, resolution: int, channels: int, resize: str, flip: bool, num_classes: int | None
    ) -> None:
        self._resolution, self._channels, self._resize = resolution, channels, resize
        self._flip, self._num_classes = flip, num_classes

    def decode(self, members: Mapping[str, memoryview], key: np.uint64 | None) -> ImageSample:
        """Decode the image and the label of a sample.

        Raises:
            ValueError: it is damaged, of another size, or its label is none of the classes.
        """
        name = next((name for name in MEMBERS if name in members), None)
        if name is None:
            raise ValueError("it has no image")
        pixels = read_pixels(members[name], self._channels, is_array=name == "npy")
        height, width, _ = pixels.shape
        if (height, width) != (self._resolution, self._resolution):
            if self._resize == NO_RESIZE:
                raise ValueError(
                    f"it has {height} x {width} pixels, and datamodule.resolution="
                    f"{self._resolution} with datamodule.resize=none"
                )
            pixels = fit_pixels(pixels, self._resolution, self._resize)
        if self._flip and key is not None and uniform(key ^ _FLIP, 1)[0] < 0.5:
            pixels = pixels[:, ::-1]
        return ImageSample(pixels, self._label(members), key)

    def _label(self, members: Mapping[str, memoryview]) -> int | None:
        if self._num_classes is None:
            return None
        label = int(bytes(members["cls"])) if "cls" in members else -1
        if not 0 <= label < self._num_classes:
            raise ValueError(f"its label is {label}, and there are {self._num_classes} classes")
        return label

    def collate(self, samples: Sequence[ImageSample]) -> KeyedImageBatch | CountedImageBatch:
        """Make a batch of samples, all of training or all of evaluation."""
        height, width, num_channels = samples[0].pixels.shape
        images = np.empty((len(samples), num_channels, height, width), np.uint8)
        for image, sample in zip(images, samples, strict=True):
            for channel in range(num_channels):  # one by one, twice as quick as a transposed copy
                image[channel] = sample.pixels[:, :, channel]
        batch = ImageBatch(images=torch.from_numpy(images))
        if self._num_classes is not None:
            batch["labels"] = torch.tensor([sample.label for sample in samples], dtype=torch.int64)
        keys = [sample.key for sample in samples if sample.key is not None]
        if keys:
            keys = torch.from_numpy(np.array(keys, np.uint64).view(np.int64))
            return KeyedImageBatch(**batch, keys=keys)
        return CountedImageBatch(**batch, counted=torch.ones(len(samples), dtype=torch.bool))

    def pad(self, batch: CountedImageBatch, num_samples: int) -> None:
        """Count the images of an evaluation's batch from `num_samples` on no more."""
        assert "counted" in batch  # in training the last step is never filled up
        batch["counted"][num_samples:] = False
