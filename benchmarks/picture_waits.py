"""What a run's pictures cost its training steps.

    python -m benchmarks.picture_waits [--preset dcgan] [--accelerator cpu] [--stretches 6]
        [--rounds 30] [--threads 2]

`experiment=gan_quickstart` by the launcher's own `fit`, in stretches of rounds that draw all its
pictures every ten rounds and stretches that draw none, in turns. Drawing goes on in a thread beside
training, so on a CPU both share its cores, and rounds are slower meanwhile; what no round may do
is wait for a picture to be finished. `in callback` is the time that training stands still for a
picture: the copy of the generator that is drawn from, or a wait for two pictures that are being
drawn already.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from omegaconf import open_dict
from rich.console import Console
from rich.table import Table

from benchmarks.gan_throughput import BATCH, RESOLUTIONS, compose_run, train
from benchmarks.turns import use_threads
from launch import runtime
from trainers.callbacks.pictures import Pictures

EVERY_ROUNDS = 10
TAKEN = "rounds.json"
WITH, WITHOUT = "pictures every 10 rounds", "no pictures"
Taken = dict[str, dict[str, list[float]]]
"""Seconds of rounds and in the callback, by kind of stretch."""


class TimeRounds(Callback):
    """Switches pictures on and off by stretches, and times rounds; a callback of the run.

    Args:
        rounds: Of a stretch.
    """

    def __init__(self, *, rounds: int):
        self.rounds = rounds
        self.taken: Taken = {kind: {"rounds": [], "in callback": []} for kind in (WITH, WITHOUT)}
        self.kind, self._begun, self._in_callback = WITHOUT, 0.0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put a stopwatch around the callback, and begin without pictures."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        self.pictures: Any = next(each for each in callbacks if isinstance(each, Pictures))
        draw = self.pictures.on_train_batch_end

        def timed(*arguments: Any) -> None:
            begun = time.perf_counter()
            draw(*arguments)
            self._in_callback = time.perf_counter() - begun

        self.pictures.on_train_batch_end = timed
        self.every_steps, self.pictures.every_steps = self.pictures.every_steps, None
        self._begun = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the round that ends here, with the callback's part in it, which is that before."""
        taken = self.taken[self.kind]
        taken["rounds"].append(time.perf_counter() - self._begun)
        taken["in callback"].append(self._in_callback)
        if (batch_idx + 1) % self.rounds == 0:
            for job, _ in self.pictures._jobs:  # or the next stretch would pay for this one
                job.result()
            self.kind = WITHOUT if self.kind == WITH else WITH
            self.pictures.every_steps = self.every_steps if self.kind == WITH else None
        self._begun = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what was taken in the run's directory."""
        Path(trainer.default_root_dir, TAKEN).write_text(json.dumps(self.taken))


def measure(folder: Path, *, preset: str, accelerator: str, stretches: int, rounds: int) -> Taken:
    """Train with all pictures of the family."""
    config = compose_run(
        folder,
        preset=preset,
        accelerator=accelerator,
        num_steps=stretches * rounds,
        callback="benchmarks.picture_waits.TimeRounds",
    )
    config.trainer.pictures_every_images = EVERY_ROUNDS * BATCH
    with open_dict(config):
        config.trainer.callbacks.benchmark.rounds = rounds
    return json.loads((train(folder, config) / TAKEN).read_text())


def report(taken: Taken) -> Table:
    """Medians and maxima, and the share of time that training stood still.

    Without the first round of each kind, which also makes what is made once.
    """
    table = Table("rounds with", "median ms", "max ms", "max in callback", "share in callback")
    for kind, values in taken.items():
        rounds, waits = (np.array(values[name][1:]) * 1e3 for name in ("rounds", "in callback"))
        table.add_row(
            kind,
            f"{np.median(rounds):.1f}",
            f"{rounds.max():.1f}",
            f"{waits.max():.2f}",
            f"{waits.sum() / rounds.sum():.3%}",
        )
    return table


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=RESOLUTIONS, default="dcgan")
    parser.add_argument("--accelerator", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--stretches", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=30, help="of a stretch")
    parser.add_argument("--threads", type=int, default=2)
    options = vars(parser.parse_args())
    use_threads(options.pop("threads"))
    runtime.quiet_libraries()
    with tempfile.TemporaryDirectory() as name:
        taken = measure(Path(name), **options)
    Console().print(report(taken))


if __name__ == "__main__":
    main()
