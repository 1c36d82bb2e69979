"""One Lightning Trainer from a run's configuration."""

import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.profilers import PassThroughProfiler, Profiler

from trainers.activation_checkpointing import ActivationCheckpointing
from trainers.batch_plan import in_steps
from trainers.callbacks.checkpointing import Checkpointing
from trainers.callbacks.own_work import OwnWork
from trainers.callbacks.pictures import Pictures
from trainers.callbacks.preemption import Preemption
from trainers.callbacks.previews import Previews
from trainers.callbacks.progress import ProgressBar
from trainers.callbacks.randomness import KeyedRandomness
from trainers.callbacks.step_guard import StepGuard
from trainers.callbacks.step_metrics import StepMetrics
from trainers.callbacks.step_vote import StepVote
from trainers.callbacks.watchdog import Report, Watchdog
from trainers.checkpoint_parts import without_credentials
from trainers.checkpoint_writer import CheckpointDirectory
from trainers.freed_memory import keep_freed_memory
from trainers.metrics import JsonLines, StampedLogger
from trainers.slowest_rank import SlowestRank
from trainers.spot_notices import SpotNotices
from trainers.strategies.parts import PartsStrategy


def build_trainer(
    config: Mapping[str, Any],
    directory: Path,
    *,
    world_size: int,
    resume_step: int,
    grad_accum: int,
    strategy: Callable[..., PartsStrategy],
    loggers: list[Logger],
    callbacks: list[Callback],
    profiler: Profiler | None,
    report: Report = lambda reason, step: None,
    last_words: Callable[[str], None] = lambda reason: None,
    ending: Callable[[], None] = lambda: None,
    drops_optimizer: bool = False,
    on_commit: Callable[[Path], None] | None = None,
    launched_at: float | None = None,
) -> lightning.Trainer:
    """Put a run's Trainer together.

    Progress is the optimizer step; one Lightning epoch is the whole run, and passes over the data
    are the stream's affair (`docs/decisions.md`).

    Args:
        config: The run's resolved configuration (`conf/train.yaml`).
        directory: The run directory.
        world_size: Number of ranks.
        resume_step: Step of the checkpoint that the run continues from; 0 at the start.
        grad_accum: Micro-batches per optimizer step; 1 for a module that accumulates by itself.
        strategy: Makes one of `trainers.strategies` from what the run decides for all of them.
        loggers: Loggers beside `metrics.jsonl`.
        callbacks: The user's own, run before ours.
        profiler: A Lightning profiler, or None.
        report: Is told why the run fails, by the rank that knows it.
        last_words: Is told why where the process then ends at once.
        ending: Is called when training ends, one way or another: a request to stop asks for nothing
            more from then on.
        drops_optimizer: Whether to continue without the optimizer state of the checkpoint.
        on_commit: Is called on rank 0 with each new checkpoint, in a thread.
        launched_at: Time of the clock from which on the budget counts; None for now.
    """
    plan, options, saves = config["plan"], config["trainer"], dict(config["checkpoints"])
    writer = CheckpointDirectory(
        _manifest_facts(config),
        asynchronous=saves.pop("asynchronous"),
        drops_optimizer=drops_optimizer,
        on_commit=on_commit,
    )
    for name in ("every", "keep_every"):
        saves[f"{name}_steps"] = in_steps(saves, name, plan["batch_samples"])
        del saves[f"{name}_images"]
    val_every = in_steps(options, "val_every", plan["batch_samples"])
    guard, vote, own_work = StepGuard(**options["guard"]), StepVote(), OwnWork()
    watchdog = Watchdog(timeout_s=options["timeout_s"], report=report, last_words=last_words)
    metrics = StepMetrics(
        log_every_steps=options["log_every_steps"],
        batch_samples=plan["batch_samples"],
        tokens_per_sample=plan["tokens_per_sample"],
        unit=plan["unit"],
        guard=guard,
        own_work=own_work,
        slowest=SlowestRank(watchdog.name_of),
    )
    accelerator = resolve_accelerator(options["accelerator"])
    if accelerator == "cpu":
        keep_freed_memory()
    checkpointing = Checkpointing(directory / "checkpoints", **saves, guard=guard, vote=vote)
    loggers = [JsonLines(directory / "metrics.jsonl", resume_step=resume_step), *loggers]
    trainer = lightning.Trainer(
        accelerator=accelerator,
        devices=world_size // config["cluster"]["nodes"],
        num_nodes=config["cluster"]["nodes"],
        strategy=strategy(
            precision=config["precision"],
            device_type=accelerator,
            gradient_clip=config["module"]["optimizer"]["gradient_clip"],
            guard=guard,
            timeout_s=options["timeout_s"],
        ),
        max_epochs=1,
        max_steps=plan["max_steps"],
        accumulate_grad_batches=grad_accum,
        val_check_interval=val_every * grad_accum,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        deterministic=options["deterministic"],
        profiler=profiler or _Unprofiled(),
        plugins=[writer, environment()],
        logger=loggers,
        callbacks=[
            watchdog,
            own_work,  # the user's callbacks are part of it
            *callbacks,
            KeyedRandomness(seed=config["seed"]),
            ActivationCheckpointing(config["activation_checkpointing"]),
            vote,
            guard,
            metrics,  # before anything is saved: what is saved has its row
            Previews(directory / "samples"),
            Pictures(
                directory / "samples",
                every_steps=in_steps(options, "pictures_every", plan["batch_samples"]),
                batch_samples=plan["batch_samples"],
            ),
            checkpointing,
            ProgressBar(metrics, monitor=saves["monitor"]),
            Preemption(
                checkpointing,
                vote,
                **_other_reasons(config["cluster"], launched_at or time.time()),
                ending=ending,
            ),
        ],
        default_root_dir=directory,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    _stamp_rows(trainer, loggers, plan)
    return trainer


class _Unprofiled(PassThroughProfiler):
    """Nobody profiles: one context for the hundred and more things Lightning does in a step."""

    _nothing = nullcontext()

    def profile(self, action_name: str) -> Any:
        """Do nothing around an action; Lightning's own makes a generator for each."""
        return self._nothing


def _other_reasons(cluster: Mapping[str, Any], launched_at: float) -> dict[str, Any]:
    """What ends a run besides signals, as arguments of `Preemption`."""
    # Runs of earlier versions lack these keys.
    minutes, notice = cluster.get("budget_minutes"), cluster.get("notice")
    return {
        "ends_at": None if minutes is None else launched_at + 60 * minutes,
        "notices": SpotNotices(notice, every_s=cluster["notice_every_s"]) if notice else None,
    }


def resolve_accelerator(accelerator: str) -> str:
    """`auto` is CUDA where there is a device, the CPU elsewhere."""
    if accelerator == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return accelerator


def environment() -> ClusterEnvironment:
    """Who is which rank: one, or as torch's variables say, whatever scheduler is around us."""
    return TorchElasticEnvironment() if "RANK" in os.environ else LightningEnvironment()


def _manifest_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "run": config["run"]["name"],
        "strategy": config["strategy"]["name"],
        "data_digest": config["data"].get("digest"),
        "configuration": without_credentials(config),
    }


def _stamp_rows(trainer: lightning.Trainer, loggers: list[Logger], plan: Mapping[str, Any]) -> None:
    def stamp() -> dict[str, float]:
        samples = trainer.global_step * plan["batch_samples"]
        epoch = getattr(trainer.datamodule, "epoch", 0)  # type: ignore[attr-defined]
        row = {"step": trainer.global_step, "samples": samples, "epoch": epoch}
        if plan["unit"] != "samples":
            row[plan["unit"]] = samples * plan["tokens_per_sample"]
        return row

    for logger in loggers:
        if isinstance(logger, StampedLogger):
            logger.stamp = stamp
