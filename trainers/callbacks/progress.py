"""The live progress bar."""

import time
from contextlib import suppress
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeftColumn

from trainers.callbacks.step_metrics import StepMetrics

SECONDS_BETWEEN_LINES = 10.0


class ProgressBar(Callback):
    """One bar for the run in optimizer steps: losses, what is monitored, tokens/s, time left.

    Where the output is no terminal, a plain line every 10 seconds says the same.
    """

    def __init__(self, metrics: StepMetrics, *, monitor: str, console: Console | None = None):
        """Take the callback that measures, and which validation metric to keep in sight."""
        self.metrics, self.monitor = metrics, monitor
        self.console = console or Console()
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._validation = ""
        self._printed_at = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar, from where the run continues."""
        if not trainer.is_global_zero:
            return
        self._started = (time.monotonic(), trainer.global_step)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps"),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeLeftColumn(elapsed_when_finished=False),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._progress.start()
        self._task = self._progress.add_task(
            "training", total=trainer.max_steps, completed=trainer.global_step, text=""
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar."""
        if self._progress is None or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self._progress.update(self._task, completed=trainer.global_step, text=self._text())
        self._print_line(trainer)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Say that validation is under way."""
        if self._progress is not None and batch_idx % 10 == 0:
            total = trainer.num_val_batches[dataloader_idx]
            self._progress.update(self._task, text=f"validating {batch_idx}/{total}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the monitored metric in sight."""
        value = trainer.callback_metrics.get(self.monitor)
        if self._progress is not None and value is not None:
            name = self.monitor.removesuffix("/loss").removeprefix("val/").replace("_", " ")
            self._validation = f" {name} {float(value):.3f}"
            self._progress.update(self._task, text=self._text())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the terminal as it was."""
        self._stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the terminal as it was also where the run does not end well."""
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _text(self) -> str:
        latest = self.metrics.latest
        if not latest:
            return ""
        unit = self.metrics.unit
        losses = {
            key.removeprefix("train/").replace("_loss", ""): value
            for key, value in latest.items()
            if key.startswith("train/") and key.endswith("loss")
        }
        text = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
        return f"{text}{self._validation} {latest[f'perf/{unit}_per_s']:,.0f} {unit}/s"

    def _print_line(self, trainer: Trainer) -> None:
        now = time.monotonic()
        step, total = trainer.global_step, trainer.max_steps
        is_quiet = now - self._printed_at < SECONDS_BETWEEN_LINES and step < total
        if self.console.is_terminal or is_quiet:
            return
        self._printed_at = now
        started_at, started_step = self._started
        left = (now - started_at) / max(step - started_step, 1) * (total - step)
        text = f"step {step}/{total} {self._text()} {left:.0f} s left"
        with suppress(OSError, SystemExit):  # whoever read it is gone; rich leaves the program
            self.console.print(text, soft_wrap=True)
