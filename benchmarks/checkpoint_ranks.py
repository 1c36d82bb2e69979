"""Trains the runs of `benchmarks.checkpoint_matrix`: ranks are forked once for each world size."""

import contextlib
import gc
import hashlib
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf

from benchmarks.cells import Cell, configure, write_text
from benchmarks.checkpoint_matrix import NUM_STEPS, Run
from benchmarks.forked_ranks import fork, fork_ranks, import_all, wait_for
from datamodules.stream import StreamDataModule
from launch.run_directory import RunDirectory
from launch.runtime import plain

Configs = dict[tuple[str, str], DictConfig]
"""By module and launch."""


class Samples(Callback):
    """Writes down which samples this rank has seen in each step; keeps validations off."""

    def __init__(self) -> None:
        self.seen: dict[int, list[str]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Validate nothing."""
        trainer.limit_val_batches = 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the rows of text, or the keys of images."""
        seen = self.seen.setdefault(trainer.global_step + 1, [])
        for micro_batch in batch if isinstance(batch, list) else [batch]:
            rows = micro_batch["keys" if "keys" in micro_batch else "inputs"]
            seen += [hashlib.blake2b(row.numpy().tobytes()).hexdigest()[:16] for row in rows]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write."""
        path = Path(trainer.default_root_dir, f"samples-{trainer.global_rank}.json")
        path.write_text(json.dumps(self.seen))


class ForgetState(Callback):
    """Loses what optimizers remember, where they are not DeepSpeed's."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget."""
        for optimizer in trainer.optimizers:
            optimizer.state.clear()


@contextlib.contextmanager
def one_step_late() -> Iterator[None]:
    """Continue behind a step's samples that were never seen."""
    load = StreamDataModule.load_state_dict

    def load_late(datamodule: StreamDataModule, state: dict[str, Any]) -> None:
        load(datamodule, state | {"position": state["position"] + state["batch_samples"]})

    with mock.patch.object(StreamDataModule, "load_state_dict", load_late):
        yield


def configure_run(run: Run, folder: Path) -> DictConfig:
    """Compose what a module's runs of one launch have in common."""
    is_gpt = run.module == "gpt"
    optimizer, micro = ("adamw", 2) if is_gpt else ("adam", None)
    cell = Cell(run.module, run.strategy, micro=micro, optimizer=optimizer)
    config = configure(cell, folder, run.num_ranks, "cpu")
    OmegaConf.set_struct(config, False)
    # What rates depend on, and one step more than is made, for the run that leaves one out.
    config.plan.max_samples = (NUM_STEPS + 1) * config.plan.batch_samples
    if is_gpt:
        config.module.optimizer.lr = 0.01
        config.module.schedule.merge_with({"name": "linear", "final_lr_fraction": 0.1})
    else:
        rate = {"start": 2e-3, "end": 2e-4, "images": None, "shape": "linear"}
        config.module.optimizer.lr = rate
    callbacks = {"samples": {"_target_": "benchmarks.checkpoint_ranks.Samples"}}
    config.trainer.callbacks = callbacks
    config.trainer.timeout_s = 60
    return OmegaConf.create(plain(config))  # resolved once, and not for each run


def train_run(run: Run, config: DictConfig, folder: Path) -> bool:
    """Train on this rank, from the checkpoint of what it continues; gives whether it was."""
    from launch.train import fit

    gc.collect()
    gc.freeze()  # what stays from run to run need not be looked through at each collection
    directory = RunDirectory(folder / run.name)
    config = config.copy()
    config.run.name, config.plan.max_steps = run.name, run.num_steps
    if run.control == "lost_state":
        target = "benchmarks.checkpoint_ranks.ForgetState"
        config.trainer.callbacks.forget = {"_target_": target}
    late = one_step_late if run.control == "late_data" else contextlib.nullcontext
    try:
        # Pictures and reports take as long as all else, waiting for the disk a tenth.
        with (
            mock.patch("launch.train.summarize", return_value={}),
            mock.patch("launch.train.print_summary"),
            mock.patch("launch.runtime.say_once"),
            mock.patch("os.fsync"),
            contextlib.redirect_stdout(None),
            late(),
        ):
            fit(directory, config)
    except Exception as error:
        (directory.path / "error.txt").write_text(f"{type(error).__name__}: {error}")
        if os.environ.get("VERBOSE"):
            traceback.print_exc()
        return False
    return True


def prepare_directory(run: Run, folder: Path) -> bool:
    """Make a run's directory, with what it continues from, as links; false if there is none."""
    (folder / run.name).mkdir()
    if run.beginning:
        begun = folder / run.beginning.name
        if not (begun / "trained").exists():
            error = (begun / "error.txt").read_text()
            (folder / run.name / "error.txt").write_text(f"{begun.name} has failed: {error}")
            return False
        target = folder / run.name / "checkpoints"
        shutil.copytree(begun / "checkpoints", target, copy_function=os.link)
    return True


def train_all(runs: list[Run], configs: Configs, folder: Path) -> None:
    """Train runs of as many ranks each; where one fails, the others by new ranks."""

    def work() -> int:
        for run in runs:
            if not train_run(run, configs[run.module, run.launch], folder):
                return 1  # and the process group with it
            if os.environ["RANK"] == "0":
                (folder / run.name / "trained").touch()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return 0

    runs = [run for run in runs if prepare_directory(run, folder)]
    while runs:
        codes = wait_for(fork_ranks(work, runs[0].num_ranks))
        runs = [run for run in runs if not (folder / run.name / "trained").exists()]
        if runs:
            if not (error := folder / runs[0].name / "error.txt").exists():
                error.write_text(f"ranks ended with codes {codes}")
            runs = runs[1:]


def main() -> None:
    """Train the runs of a file, those that begin first."""
    jobs = Path(sys.argv[1])
    folder, started = jobs.parent, time.perf_counter()
    runs = [Run(**values) for values in json.loads(jobs.read_text())]
    import_all()
    write_text(folder)
    ones = {(run.module, run.launch): run for run in runs}
    configs = {key: configure_run(run, folder) for key, run in ones.items()}
    print(f"imported and configured: {time.perf_counter() - started:.0f} s", flush=True)
    for is_later in (False, True):
        for num_ranks in sorted({run.num_ranks for run in runs}):
            own = [r for r in runs if (r.num_ranks, bool(r.continues)) == (num_ranks, is_later)]
            shares = [own[::2], own[1::2]] if num_ranks == 1 else [own]  # one rank is one core
            # A process that forks each share's ranks: each waits for its own.
            helpers = [
                fork(lambda share=share: train_all(share, configs, folder), {})
                for share in shares
                if share
            ]
            if any(codes := wait_for(helpers)):
                sys.exit(f"ranks could not be started: {codes}")
            seconds = time.perf_counter() - started
            print(f"{len(own)} runs on {num_ranks} rank(s): {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
