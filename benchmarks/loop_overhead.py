"""What a training step costs here, beside a plain torch loop around the same network.

    python -m benchmarks.loop_overhead [--steps 2000] [--seeds 1] [--threads 1]

Trains `experiment=gpt_char_cpu` on a megabyte of the standard library's source, twice in one
process and in turns of 100 steps, so that both share whatever else the machine does:

    Trainyard    the Lightning trainer that `launch.train` builds, with all its callbacks, stream,
                 logging and progress lines; validation, which only comes at the end, is left out
    plain loop   nanoGPT's form: random crops of an array in memory, forward, backward, clipping,
                 fused AdamW, gradients set to None, the schedule set by hand, the loss read at the
                 same steps as Trainyard logs it

Network class, initial values, optimizer, schedule, precision and threads are the same on both
sides. The table has the median over the turns, without each side's first, and the loss that each
ends at on the same rows, the whole validation split.
"""

import argparse
import math
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor, nn

from benchmarks.turns import use_threads
from launch import runtime
from launch.completion import complete
from trainers.build import build_trainer
from trainers.strategies.replicated import Single

TURN_STEPS = 100
TEXT_BYTES = 2**20

Pair = tuple[Tensor, Tensor]


def write_text(path: Path) -> None:
    """Write a megabyte of ASCII source, from the modules at the top of the standard library."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = (source.read_text("utf-8") for source in sources)
    path.write_text("".join(text for text in texts if text.isascii())[:TEXT_BYTES])


def configure(folder: Path, *, seed: int, steps: int) -> DictConfig:
    """Compose the run as the command line does, and prepare its data."""
    overrides = [
        "experiment=gpt_char_cpu",
        f"corpus.path={folder / 'input.txt'}",
        f"data_dir={folder / 'data'}",
        f"seed={seed}",
        f"max_steps={steps}",
        f"trainer.val_every_steps={steps}",
        "trainer.accelerator=cpu",
    ]
    with initialize_config_module("conf", version_base=None):
        config = compose("train", overrides)
    complete(config, 1)
    return config


def random_crops(tokens: np.ndarray, length: int, batch: int, seed: int) -> Iterator[Pair]:
    """Draw batches [B, T] at random places, as nanoGPT does, without end."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(tokens) - length, batch).tolist()
        yield (
            torch.stack([torch.from_numpy(tokens[i : i + length]) for i in starts]),
            torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + length]) for i in starts]),
        )


class PlainLoop:
    """The hand-written side: everything a step needs, and nothing else.

    Args:
        config: The completed configuration; its numbers are read here by hand.
        network: At its initial values.
        tokens: int64, the training split in memory.
    """

    def __init__(self, config: DictConfig, network: nn.Module, tokens: np.ndarray):
        self.network, self.settings = network, config.module.optimizer
        self.schedule, self.plan = config.module.schedule, config.plan
        self.log_every_steps, self.step, self.losses = config.trainer.log_every_steps, 0, []
        parameters = list(network.parameters())
        decay = self.settings.weight_decay
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": decay},
                {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
            ],
            betas=tuple(self.settings.adamw.betas),
            eps=self.settings.adamw.eps,
            fused=True,
        )
        length = config.datamodule.sequence_length
        self.batches = random_crops(tokens, length, config.plan.batch_samples, config.seed)

    def train(self, num_steps: int) -> None:
        """Take some steps."""
        for _ in range(num_steps):
            inputs, targets = next(self.batches)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate()
            loss = self.network(inputs, targets)
            loss.backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.gradient_clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            if self.step % self.log_every_steps == 0:
                self.losses.append(loss.item())

    def rate(self) -> float:
        """Learning rate of the next step: linear warm-up, then a cosine down to a fraction."""
        peak, final = self.settings.lr, self.schedule.final_lr_fraction
        warmup = self.schedule.warmup_samples // self.plan.batch_samples
        if self.step + 1 < warmup:
            return peak * (self.step + 1) / warmup
        x = (self.step - warmup) / (self.plan.max_steps - warmup)
        return peak * (final + (1 - final) * (1 + math.cos(math.pi * max(x, 0))) / 2)


class TakeTurns(Callback):
    """Lets the plain loop run after every `TURN_STEPS` steps of the trainer, and times both."""

    def __init__(self, plain: PlainLoop):
        self.plain = plain
        self.seconds: dict[str, list[float]] = {"Trainyard": [], "plain loop": []}
        self._mark = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the trainer's clock."""
        self._mark = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End a turn of the trainer where it is over."""
        if (batch_idx + 1) % TURN_STEPS == 0:
            self._take_turn()

    def _take_turn(self) -> None:
        switch = time.perf_counter()
        self.plain.train(TURN_STEPS)
        back = time.perf_counter()
        self.seconds["Trainyard"].append(switch - self._mark)
        self.seconds["plain loop"].append(back - switch)
        self._mark = back


@torch.no_grad()
def evaluate(network: nn.Module, batches: Iterable[Any]) -> float:
    """Mean loss in nats over all targets of some batches."""
    network.eval()
    total, count = 0.0, 0
    for batch in batches:
        counted = int((batch["targets"] >= 0).sum())
        total += float(network(batch["inputs"], batch["targets"])) * counted
        count += counted
    return total / count


def compete(folder: Path, *, seed: int, steps: int) -> tuple[dict[str, list[float]], list[float]]:
    """Train both sides in turns.

    Returns:
        Seconds of each side's turns, and the validation losses that the two end at.
    """
    config = configure(folder, seed=seed, steps=steps)
    module = instantiate(config.module, _convert_="all")
    datamodule: LightningDataModule = instantiate(config.datamodule, _convert_="all")
    same = instantiate(config.module, _convert_="all")
    same.configure_model()
    same_start = same.network
    tokenizer = Tokenizer.from_file(f"{config.data.path}/tokenizer.json")
    text = (folder / "input.txt").read_text()[: config.data.bytes.train]  # ASCII: bytes are letters
    plain = PlainLoop(config, same_start, np.array(tokenizer.encode(text).ids))
    turns = TakeTurns(plain)
    (directory := folder / f"seed-{seed}").mkdir()
    trainer = build_trainer(
        runtime.plain(config),
        directory,
        world_size=1,
        resume_step=0,
        grad_accum=1,
        strategy=Single,
        loggers=[],
        callbacks=[turns],
        profiler=None,
    )
    trainer.fit(module, datamodule)
    losses = [evaluate(side, datamodule.val_dataloader()) for side in (module.network, same_start)]
    return turns.seconds, losses


def report(
    seconds: dict[str, list[float]], losses: list[float], *, seed: int, tokens_per_step: int
) -> Table:
    """Medians over the turns, the first left out, and the losses."""
    table = Table("side", "ms a step", "tokens/s", "x plain loop", "val loss")
    turns = len(seconds["Trainyard"])
    table.title = f"gpt_char_cpu, seed {seed}: {turns} turns of {TURN_STEPS} steps"
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    for (name, median), loss in zip(medians.items(), losses, strict=True):
        table.add_row(
            name,
            f"{median / TURN_STEPS * 1e3:.2f}",
            f"{tokens_per_step * TURN_STEPS / median:,.0f}",
            f"{medians['plain loop'] / median:.3f}",
            f"{loss:.4f}",
        )
    pairs = zip(*(values[1:] for values in seconds.values()), strict=True)
    ratios = sorted(plain / ours for ours, plain in pairs)
    table.caption = (
        f"ratio turn by turn: median {statistics.median(ratios):.3f}, "
        f"from {ratios[0]:.3f} to {ratios[-1]:.3f}"
    )
    return table


def main() -> None:
    """Train both sides for each seed and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help=f"a multiple of {TURN_STEPS}")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.steps % TURN_STEPS or options.steps < 2 * TURN_STEPS:
        parser.error(f"--steps={options.steps}: give a multiple of {TURN_STEPS}, at least two")
    use_threads(options.threads)
    runtime.quiet_libraries()
    with tempfile.TemporaryDirectory() as name:
        write_text((folder := Path(name)) / "input.txt")
        for seed in range(1, options.seeds + 1):
            seconds, losses = compete(folder, seed=seed, steps=options.steps)
            Console().print(report(seconds, losses, seed=seed, tokens_per_step=12 * 64))


if __name__ == "__main__":
    main()
