"""Pictures of what an image model generates, while training goes on."""

import shutil
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from trainers.metrics import StampedLogger

Drawings = Mapping[str, Callable[[], Any]]
"""By name what draws a picture: gives a uint8 array [height, width, 3]."""
Written = tuple[dict[str, Path], dict[str, str]]
_MAX_PENDING = 2  # each holds a copy of a generator


def folder_name(num_images: int) -> str:
    """Where in `samples/` the pictures are that were drawn after training on `num_images`."""
    return f"images-{num_images:09d}"


def write_pictures(drawings: Drawings, folder: Path) -> Written:
    """Draw, and write PNG files to a folder that is there with all that can be, or not at all.

    Returns:
        The files by name, and of what could not be drawn or written the reason.
    """
    from PIL import Image

    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    failures = {}
    try:
        for name, draw in drawings.items():
            file = scratch / f"{name}.png"
            try:
                Image.fromarray(draw()).save(file)
            except Exception as error:
                file.unlink(missing_ok=True)
                failures[name] = f"{type(error).__name__}: {error}"
        names = [name for name in drawings if name not in failures]
        if names:
            shutil.rmtree(folder, ignore_errors=True)
            scratch.replace(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return {name: folder / f"{name}.png" for name in names}, failures


class Pictures(Callback):
    """Writes what `module.pictures()` draws to `samples/images-<images so far>/<name>.png`.

    Every so many steps, after each validation and at the end. `module.pictures()` is called between
    two steps and only takes a copy of what it needs; what it returns draws, on one thread of rank
    zero beside training, which waits only if two are being drawn already. All are finished before
    the run ends, in whatever way. A picture that cannot be drawn is a warning, and the others are
    kept.

    They go to the loggers too, when they are there. Nothing happens on other ranks, nor for a
    module without `pictures`.

    Args:
        directory: `samples/` of the run.
        every_steps: Between pictures; None: only after validations.
        batch_samples: Images of a step, over all ranks.
    """

    def __init__(self, directory: str | Path, *, every_steps: int | None, batch_samples: int):
        self.directory = Path(directory)
        self.every_steps, self.batch_samples = every_steps, batch_samples
        self._jobs: deque[tuple[Future[Written], int]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pictures")
        self._drawn_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tidy up after a crash, and draw what it may have taken.

        That is waited for: the data's workers are forked next, which no other thread may have a
        lock at.
        """
        if not trainer.is_global_zero:
            return
        for path in self.directory.glob(".images-*"):
            shutil.rmtree(path)
        step = trainer.global_step
        if self._folder(step).exists():
            self._drawn_step = step
        elif self._is_due(step) or self._is_validated(trainer):
            self._draw(trainer, pl_module)
            self._wait(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what is finished; draw if it is time."""
        while self._jobs and self._jobs[0][0].done():
            self._finish_oldest(trainer)
        is_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if is_step and self._is_due(trainer.global_step):
            self._draw(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what was scored."""
        if trainer.state.fn == "fit":
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what the run has come to, and wait."""
        self._draw(trainer, pl_module)
        self._finish(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Wait for what was begun."""
        self._finish(trainer)

    def _folder(self, step: int) -> Path:
        return self.directory / folder_name(step * self.batch_samples)

    def _is_due(self, step: int) -> bool:
        return self.every_steps is not None and step > 0 and step % self.every_steps == 0

    def _is_validated(self, trainer: Trainer) -> bool:
        micro_batches = trainer.global_step * trainer.accumulate_grad_batches
        return micro_batches > 0 and micro_batches % trainer.val_check_interval == 0

    def _draw(self, trainer: Trainer, module: Any) -> None:
        step = trainer.global_step
        if not (trainer.is_global_zero and hasattr(module, "pictures")) or step == self._drawn_step:
            return
        while len(self._jobs) >= _MAX_PENDING:
            self._finish_oldest(trainer)
        self._drawn_step = step
        job = self._thread.submit(write_pictures, module.pictures(), self._folder(step))
        self._jobs.append((job, step * self.batch_samples))

    def _finish_oldest(self, trainer: Trainer) -> None:
        job, num_images = self._jobs.popleft()
        try:
            pictures, failures = job.result()
        except Exception as error:
            pictures, failures = {}, {"all": f"{type(error).__name__}: {error}"}
        for name, reason in failures.items():
            warnings.warn(
                f"pictures after {num_images:,} images: {name} could not be drawn, and training "
                f"goes on: {reason}",
                stacklevel=2,
            )
        for logger in trainer.loggers:
            if pictures and isinstance(logger, StampedLogger):
                logger.log_pictures(pictures, num_images)

    def _wait(self, trainer: Trainer) -> None:
        while self._jobs:
            self._finish_oldest(trainer)

    def _finish(self, trainer: Trainer) -> None:
        self._wait(trainer)
        self._thread.shutdown()
