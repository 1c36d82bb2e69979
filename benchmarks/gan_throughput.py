"""A round of a GAN here, beside Lightning's own example of two optimizers.

    python -m benchmarks.gan_throughput [--preset dcgan] [--precision fp32] [--accelerator cpu]
        [--turns 9] [--rounds 10] [--threads 2]

All sides train the same networks (`modules.gan_networks`) on batches of 64 digits with Adam, in
one process and in turns, so that they share whatever else the machine does:

    Trainyard                 `experiment=gan_quickstart` by the launcher's own `fit`, with all its
                              callbacks, guards, metrics and stream; validations, pictures and
                              saves, which only come at the end, are left out
    Trainyard, fakes twice    the same with `module.loss.one_noise=false`
    Lightning's example       its round under Lightning's Trainer: generator first, fakes made again
                              for the discriminator, which sees the two kinds in passes of their own
    plain loop, its round     the same without Lightning
    plain loop, our round     Trainyard's round without Trainyard: fakes made once, one pass of the
                              discriminator for both kinds, fused Adam, and the moving average

So the third row over the first is what a user gains, the first over the last what a run's callbacks
cost. Convolutions in channels-last belong to the networks, and so all sides have them. The peers
get images in memory as what networks take, and neither log to a file nor show a bar; no other side
has a moving average. Rounds of the example that Trainyard does not have a setting for (one pass for
both kinds, fused Adam) are told apart by the two plain loops.

Medians of wall time over the turns without the first, and of processor time, which other processes
disturb less; ratios turn by turn. On CUDA the clocks wait for the device.
"""

import argparse
import contextlib
import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from omegaconf import DictConfig, open_dict
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.gan_peers import ExampleSide, OurRoundSide, PlainSide
from benchmarks.turns import clocks, use_threads
from launch import runtime
from launch.completion import complete
from launch.run_directory import RunDirectory
from launch.train import fit
from modules.gan_average import to_floats

BATCH = 64
RESOLUTIONS = {"dcgan": 28, "dcgan_tiny": 28, "sngan": 32, "sngan_tiny": 32, "r3gan_tiny": 32}
OURS, FAKES_TWICE, EXAMPLE = "Trainyard", "Trainyard, fakes twice", "Lightning's example"
PEERS: dict[str, Any] = {
    EXAMPLE: ExampleSide,
    "plain loop, its round": PlainSide,
    "plain loop, our round": OurRoundSide,
}
TAKEN = "turns.pt"
Turns = dict[str, Tensor]
"""Seconds by side: [turns, 2], on the wall's clock and of processors."""


class TakeTurns(Callback):
    """Lets the peers run after every two turns of our run, and times all; a callback of the run.

    Args:
        rounds: Of a turn.
        precision: Of the peers, as the run's.
        accelerator: Likewise.
    """

    def __init__(self, *, rounds: int, precision: str, accelerator: str):
        self.rounds = rounds
        self.options = {"batch": BATCH, "precision": precision, "accelerator": accelerator}
        self.peers: dict[str, Any] = {}
        self.taken: dict[str, list[Tensor]] = {OURS: [], FAKES_TWICE: []}
        self._begun = clocks()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the peers around the same networks and images, and start our clock."""
        module: Any = pl_module
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        images = to_floats(datamodule.some("train", 10**6)[0])
        for name, side in PEERS.items():
            networks = copy.deepcopy((module.generator, module.discriminator))
            self.peers[name] = side(networks, images, **self.options)
            self.taken[name] = []
        module.objective.one_noise = True
        self._begun = clocks()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End a turn of ours where it is over."""
        if (batch_idx + 1) % self.rounds:
            return
        objective: Any = pl_module.objective
        self.taken[OURS if objective.one_noise else FAKES_TWICE].append(clocks() - self._begun)
        if not objective.one_noise:
            for name, peer in self.peers.items():
                self.taken[name].append(peer.turn(self.rounds))
        objective.one_noise = not objective.one_noise
        self._begun = clocks()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what was taken in the run's directory."""
        taken = {name: torch.stack(turns) for name, turns in self.taken.items()}
        torch.save(taken, Path(trainer.default_root_dir, TAKEN))


def compose_run(
    folder: Path, *, preset: str, accelerator: str, num_steps: int, callback: str
) -> DictConfig:
    """Compose and prepare a run whose validation, and all that comes with it, is at its end.

    Args:
        folder: For its data and the run.
        preset: A name of `RESOLUTIONS`.
        accelerator: `cpu` or `cuda`.
        num_steps: Rounds.
        callback: Target of one of its callbacks, whose arguments are still to come.
    """
    overrides = [
        "experiment=gan_quickstart",
        f"runs_dir={folder / 'runs'}",
        f"data_dir={folder / 'data'}",
        f"module.preset={preset}",
        "module.network.width_factor=null",
        f"datamodule.resolution={RESOLUTIONS[preset]}",
        f"trainer.accelerator={accelerator}",
        f"batch_images={BATCH}",
        "max_images=null",
        f"max_steps={num_steps}",
        "trainer.val_every_images=null",
        f"trainer.val_every_steps={num_steps}",
        "datamodule.val_max_samples=8",
        "module.scores.extractor.training_steps=1",
        "checkpoints.every_images=null",
        "checkpoints.every_minutes=null",
        f"+trainer.callbacks.benchmark._target_={callback}",
    ]
    with initialize_config_module("conf", version_base=None):
        return compose("train", overrides)


def train(folder: Path, config: DictConfig) -> Path:
    """Train the run by the launcher's own `fit`, and give its directory.

    What it prints goes to a file. Ends the program where a signal has stopped the run.
    """
    complete(config, 1)
    run = RunDirectory(Path(config.runs_dir, config.run.name))
    run.path.mkdir(parents=True)
    run.accept(config)
    with (folder / "printed.txt").open("w") as printed, contextlib.redirect_stdout(printed):
        code = fit(run, config)
    if code != runtime.DONE:
        sys.exit(code)
    return run.path


def compete(
    folder: Path, *, preset: str, precision: str, accelerator: str, turns: int, rounds: int
) -> Turns:
    """Train all sides in turns."""
    config = compose_run(
        folder,
        preset=preset,
        accelerator=accelerator,
        num_steps=2 * turns * rounds,
        callback="benchmarks.gan_throughput.TakeTurns",
    )
    config.precision = precision
    settings = {"rounds": rounds, "precision": precision, "accelerator": accelerator}
    with open_dict(config):
        config.trainer.callbacks.benchmark.update(settings)
    return torch.load(train(folder, config) / TAKEN)


def report(taken: Turns, *, rounds: int, title: str) -> Table:
    """Medians over the turns, without the first, and ratios turn by turn."""
    table = Table("side", "ms a round", "images/s", "x example", "from", "to", "x by processor")
    table.title = title
    for name, turns in taken.items():
        wall = turns[1:, 0].median().item()
        ratios = taken[EXAMPLE][1:] / turns[1:]
        low, median, high = ratios[:, 0].quantile(torch.tensor([0, 0.5, 1]).double()).tolist()
        table.add_row(
            name,
            f"{wall / rounds * 1e3:.1f}",
            f"{BATCH * rounds / wall:,.0f}",
            *(f"{value:.2f}" for value in (median, low, high)),
            f"{ratios[:, 1].median():.2f}",
        )
    return table


def main() -> None:
    """Train all sides and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=RESOLUTIONS, default="dcgan")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--accelerator", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--turns", type=int, default=9, help="of each side; the first is not used")
    parser.add_argument("--rounds", type=int, default=10, help="of a turn")
    parser.add_argument("--threads", type=int, default=2)
    options = vars(parser.parse_args())
    use_threads(options.pop("threads"))
    runtime.quiet_libraries()
    with tempfile.TemporaryDirectory() as name:
        taken = compete(Path(name), **options)
    title = "{preset}, {precision} on {accelerator}: {turns} turns of {rounds} rounds"
    Console().print(report(taken, rounds=options["rounds"], title=title.format(**options)))


if __name__ == "__main__":
    main()
