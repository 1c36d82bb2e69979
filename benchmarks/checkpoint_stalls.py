"""How long training stands still for a save, written beside it and not.

    python -m benchmarks.checkpoint_stalls [launches=single@1,ddp@2,zero2@2,fsdp@2]
        [modes=asynchronous,synchronous] [saves=6] [steps=20] [layers=8] [width=512] [samples=2]
        [tokens=32] [precision=fp32] [accelerator=cpu] [folder=/tmp]

A GPT with AdamW by the launcher's own `fit`, in stretches of so many steps that begin with a save
and stretches that have none, in turns; a save that is not done at its stretch's end is waited for,
and the wait counts. On several ranks, times are those of the first.

    in save   seconds in which `save` does not return
    stall     the longest step of a stretch with a save, less the median step of those without
    lost      the stretch as a whole, less that without a save before it: also what writing takes
              from steps beside it
    share     what is lost, of the time of 100 steps and one save
    durable   seconds until the checkpoint is synced, in its place and named by `last`
"""

import json
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

from hydra import compose, initialize_config_module
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from benchmarks.cells import start_ranks, write_text
from launch.completion import complete
from launch.ranks import die_with_parent
from launch.run_directory import RunDirectory
from launch.train import fit
from trainers.callbacks.checkpointing import Checkpointing, writer_of
from trainers.checkpoint import list_checkpoints, size_of

WARM_STEPS = 5
EVERY_STEPS = 100
FOUND, JOBS = "stalls.json", "jobs.json"
DEFAULTS: dict[str, Any] = {
    "launches": "single@1,ddp@2,zero2@2,fsdp@2",
    "modes": "asynchronous,synchronous",
    "saves": 6,
    "steps": 20,
    "layers": 8,
    "width": 512,
    "samples": 2,
    "tokens": 32,
    "precision": "fp32",
    "accelerator": "cpu",
    "folder": None,
}


class TimeSaves(Callback):
    """Saves at the beginning of every other stretch, and times steps.

    Args:
        steps: Of a stretch.
    """

    def __init__(self, *, steps: int):
        self.steps = steps
        self.found: list[dict[str, Any]] = []
        self.began, self.last, self.committed = 0, 0.0, 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Validate nothing."""
        trainer.limit_val_batches = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put a stopwatch where a checkpoint is in its place."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        self.checkpointing: Any = next(e for e in callbacks if isinstance(e, Checkpointing))
        point = self.checkpointing._point_to

        def timed(*arguments: Any) -> None:
            point(*arguments)
            self.committed = time.perf_counter()

        self.checkpointing._point_to = timed

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the step's time; begin a stretch where one ends."""
        if trainer.strategy.root_device.type == "cuda":
            import torch

            torch.cuda.synchronize()
        now = time.perf_counter()
        number, place = divmod(batch_idx + 1 - WARM_STEPS, self.steps)
        if self.found and number >= 0:
            self.found[-1]["steps"].append(now - self.last)
        self.last = now
        if number < 0 or place:
            return
        self._end(trainer)
        self.last = began = time.perf_counter()
        self.found.append({"steps": [], "saves": number % 2 == 1, "in save": 0.0, "wait": 0.0})
        if number % 2:
            self.checkpointing.save(trainer)
            self.found[-1] |= {"in save": time.perf_counter() - began, "began": began}

    def _end(self, trainer: Trainer) -> None:
        """Wait for the stretch's save."""
        if not self.found or not self.found[-1]["saves"]:
            return
        began, stretch = time.perf_counter(), self.found[-1]
        self.checkpointing.wait(trainer)
        stretch["wait"] = time.perf_counter() - began
        stretch["durable"] = self.committed - stretch["began"]
        checkpoint = list_checkpoints(self.checkpointing.directory)[-1]
        stretch["bytes"] = size_of(checkpoint)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what was found in the run's directory."""
        if trainer.is_global_zero:
            found = {
                "stretches": [s for s in self.found if len(s["steps"]) == self.steps],
                "parameters": sum(p.numel() for p in pl_module.parameters()),
                "is asynchronous": writer_of(trainer).asynchronous,
            }
            Path(trainer.default_root_dir, FOUND).write_text(json.dumps(found))


def configure(options: dict[str, Any], launch: str, mode: str, folder: Path) -> DictConfig:
    """Compose and complete a run's configuration."""
    strategy, ranks = launch.split("@")
    network = {"num_layers": options["layers"], "width": options["width"], "dropout": 0.0}
    network["num_heads"] = max(1, options["width"] // 64)
    text = ", ".join(f"{key}: {value}" for key, value in network.items())
    num_steps = WARM_STEPS + 2 * options["saves"] * options["steps"]
    overrides = [
        "experiment=gpt_char_cpu",
        f"run.name={launch}-{mode}",
        f"corpus.path={folder / 'text.txt'}",
        "corpus.num_processes=1",
        f"data_dir={folder / 'data'}",
        f"runs_dir={folder / 'runs'}",
        f"strategy={strategy}",
        f"precision={options['precision']}",
        f"trainer.devices={ranks}",
        f"trainer.accelerator={options['accelerator']}",
        f"batch_samples={options['samples']}",
        f"max_steps={num_steps}",
        f"datamodule.sequence_length={options['tokens']}",
        f"module.network={{{text}}}",
        "module.schedule.warmup_samples=0",
        "checkpoints={every_minutes: null, keep_last: 1, asynchronous: "
        f"{str(mode == 'asynchronous').lower()}}}",
        "+trainer.callbacks.stalls={_target_: benchmarks.checkpoint_stalls.TimeSaves, "
        f"steps: {options['steps']}}}",
    ]
    with initialize_config_module("conf", version_base=None):
        config = compose("train", overrides)
    complete(config, int(ranks))
    return config


def measure(options: dict[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """Train all runs, on ranks that are started once for each number of them."""
    write_text(folder)
    launches, modes = options["launches"].split(","), options["modes"].split(",")
    names = []
    for launch, mode in product(launches, modes):
        names.append(f"{launch}-{mode}")
        run = RunDirectory(folder / "runs" / names[-1])
        run.path.mkdir(parents=True)
        run.accept(configure(options, launch, mode, folder))
    for ranks in sorted({int(launch.split("@")[1]) for launch in launches}):
        own = [name for name in names if f"@{ranks}-" in name]
        (jobs := folder / JOBS).write_text(json.dumps(own))
        start_ranks("benchmarks.checkpoint_stalls", [str(jobs)], ranks)
    return {name: json.loads((folder / "runs" / name / FOUND).read_text()) for name in names}


def row(found: dict[str, Any]) -> list[str]:
    """A run's numbers."""
    stretches = found["stretches"]
    pairs = list(zip(stretches[::2], stretches[1::2], strict=True))
    step = statistics.median(s for without, _ in pairs for s in without["steps"])
    saves = [save for _, save in pairs]
    in_save = [save["in save"] for save in saves]
    stalls = [max(save["steps"]) - step for save in saves]
    lost = statistics.median(
        sum(save["steps"]) + save["wait"] - sum(without["steps"]) for without, save in pairs
    )
    durable = statistics.median(save["durable"] for save in saves)
    size = saves[-1]["bytes"]
    return [
        f"{found['parameters'] / 1e6:.0f} M",
        f"{size / 1e6:.0f}",
        f"{1e3 * step:.0f}",
        *(f"{1e3 * pick(t):.0f}" for t in (in_save, stalls) for pick in (statistics.median, max)),
        f"{1e3 * lost:.0f}",
        f"{lost / (EVERY_STEPS * step + lost):.2%}",
        f"{durable:.2f}",
        f"{size / durable / 1e6:.0f}",
    ]


def report(found: dict[str, dict[str, Any]]) -> Table:
    """A line a run; times in milliseconds, median and longest."""
    titles = ["parameters", "MB", "step", "in save", "longest", "stall", "longest", "lost"]
    table = Table("run", *titles, f"share of {EVERY_STEPS}", "durable s", "MB/s")
    for name, values in found.items():
        table.add_row(name.replace("-", "\n"), *row(values))
    return table


def main() -> None:
    """Measure and print; as a rank, train the runs of a file."""
    if sys.argv[1:] and sys.argv[1].endswith(JOBS):
        die_with_parent()
        jobs = Path(sys.argv[1])
        for name in json.loads(jobs.read_text()):
            run = RunDirectory(jobs.parent / "runs" / name)
            with redirect_stdout(None), mock.patch("trainers.metrics.plot_losses"):
                fit(run, run.config)
        return
    given = OmegaConf.to_container(OmegaConf.from_dotlist(sys.argv[1:]))
    assert isinstance(given, dict)
    for key in given:
        if key not in DEFAULTS:
            sys.exit(f"{key}={given[key]} -> no such key -> use one of {', '.join(DEFAULTS)}")
    options: dict[str, Any] = DEFAULTS | given  # type: ignore[operator]
    with tempfile.TemporaryDirectory(dir=options["folder"]) as name:
        found = measure(options, Path(name))
    Console(width=140).print(report(found))
    print("Times in ms, median and longest.")


if __name__ == "__main__":
    main()
