"""What a setting may be by itself, checked before a device is touched."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from trainers.rules import is_submission
from trainers.spot_notices import LOOKS

PRECISIONS = ("fp32", "bf16", "fp16", "auto")
ACCELERATORS = ("auto", "cpu", "cuda")
PARAMETERS = ("fp32", "low")
ACTIONS = ("stop", "skip")
STAGES = (1, 2, 3)

Check = Callable[[Mapping[str, Any]], str | None]


@dataclass(frozen=True)
class Number:
    """What a number may be; as text, what is said of one that may not.

    Attributes:
        least: It is this or more; or, of one that need not be whole and at 0, more.
        is_whole: Whether it is a whole number.
        null: What null stands for, where it may be given.
    """

    least: int
    is_whole: bool = True
    null: str | None = None

    def allows(self, value: object) -> bool:
        """Whether it may be this."""
        if value is None:
            return self.null is not None
        kinds = int if self.is_whole else int | float
        if isinstance(value, bool) or not isinstance(value, kinds):
            return False
        return value >= self.least if self.is_whole or self.least else value > 0

    def __str__(self) -> str:
        bound = f"{self.least} or more" if self.is_whole or self.least else "more than 0"
        what = "a whole number" if self.is_whole else "a number"
        return f"it is {what} -> use {bound}" + (f", or null for {self.null}" if self.null else "")


NUMBERS = {
    "seed": Number(0),
    "checkpoints.every_steps": Number(1, null="never"),
    "checkpoints.every_images": Number(1, null="never"),
    "checkpoints.every_minutes": Number(0, is_whole=False, null="never"),
    "checkpoints.keep_last": Number(1),
    "checkpoints.keep_every_steps": Number(1, null="never"),
    "checkpoints.keep_every_images": Number(1, null="never"),
    "checkpoints.max_gib": Number(0, is_whole=False, null="no bound"),
    "trainer.log_every_steps": Number(1),
    "trainer.val_every_steps": Number(1),
    "trainer.val_every_images": Number(1, null="never"),
    "trainer.pictures_every_images": Number(1, null="never"),
    "trainer.timeout_s": Number(1, is_whole=False),
    "trainer.guard.spike.memory_steps": Number(1, is_whole=False),
    "trainer.guard.max_skips": Number(0),
    "cluster.rendezvous_timeout_s": Number(0, is_whole=False),
    "cluster.max_restarts": Number(0),
    "cluster.port": Number(1, null="one made of the job's number"),
    "cluster.budget_minutes": Number(0, is_whole=False, null="none"),
    "cluster.notice_every_s": Number(0, is_whole=False),
}


def check_values(config: Mapping[str, Any]) -> None:
    """Check settings one by one.

    Raises:
        ValueError: The first that cannot be, as `key=value -> why -> what to change`.
    """
    for find in CHECKS:
        if message := find(config):
            raise ValueError(message)
    refuse_unknown_mode(config["activation_checkpointing"])


def check_machine(config: Mapping[str, Any]) -> None:
    """Check that this machine has the devices, unless the run will be on others.

    Raises:
        ValueError: It has not.
    """
    accelerator, devices = config["trainer"]["accelerator"], config["trainer"]["devices"]
    if is_submission(config):
        return
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "trainer.accelerator=cuda -> torch sees no CUDA device on this machine -> "
            "use trainer.accelerator=auto, or look at `nvidia-smi` and the installed torch"
        )
    if uses_cuda(config) and devices > torch.cuda.device_count():
        raise ValueError(
            f"trainer.devices={devices} -> this machine has {torch.cuda.device_count()} CUDA "
            f"device(s) -> lower it, or use trainer.accelerator=cpu"
        )


def refuse_unknown_mode(mode: str) -> None:
    """Check `activation_checkpointing=`.

    Raises:
        ValueError: No such mode.
    """
    if not re.fullmatch(r"none|full|selective|every_[1-9]\d*", mode):
        raise ValueError(
            f"activation_checkpointing={mode} -> no such mode -> use none, full, selective, "
            "or every_<n> such as every_2"
        )


def resolve_precision(config: Mapping[str, Any]) -> str:
    """`auto` is bf16 where the hardware multiplies it faster (CUDA, AMX, AVX-512 BF16), else fp32.

    On a CUDA device without bf16 it is fp16.
    """
    if config["precision"] != "auto":
        return config["precision"]
    if uses_cuda(config):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
        return "bf16"
    return "fp32"


def uses_cuda(config: Mapping[str, Any]) -> bool:
    """Whether the run will be on CUDA devices."""
    return config["trainer"]["accelerator"] != "cpu" and torch.cuda.is_available()


def _choices(config: Mapping[str, Any]) -> str | None:
    make = config["strategy"].get("make") or {}
    guard = config["trainer"]["guard"]
    chosen = [
        ("precision", config["precision"], PRECISIONS),
        ("trainer.accelerator", config["trainer"]["accelerator"], ACCELERATORS),
        ("trainer.guard.nonfinite", guard["nonfinite"], ACTIONS),
        ("trainer.guard.spike.action", guard["spike"]["action"], ACTIONS),
        ("strategy.make.parameters", make.get("parameters", "fp32"), PARAMETERS),
        ("strategy.make.stage", make.get("stage", 1), STAGES),
    ]
    for part, stage in (make.get("part_stages") or {}).items():
        chosen.append((f"strategy.make.part_stages.{part}", stage, STAGES))
    for key, value, choices in chosen:
        if value not in choices:
            return f"{key}={value} -> unknown -> use one of {', '.join(map(str, choices))}"
    return None


def _devices(config: Mapping[str, Any]) -> str | None:
    devices = config["trainer"]["devices"]
    if not isinstance(devices, int) or devices < 1:
        return f"trainer.devices={devices} -> a number of devices per node -> use 1 or more"
    return None


def _numbers(config: Mapping[str, Any]) -> str | None:
    for key, number in NUMBERS.items():
        node, _, name = key.rpartition(".")
        value: Any = config
        for part in node.split(".") if node else ():
            value = value[part]
        if name not in value:  # runs of earlier versions lack some, and clusters have their own
            continue
        if not number.allows(value[name]):
            return f"{key}={value[name]} -> {number}"
    return None


def _run_name(config: Mapping[str, Any]) -> str | None:
    name = str(config["run"]["name"] or "")
    if name and not set(name) & set("/\\\0") and name not in (".", ".."):
        return None
    return f"run.name={name} -> it names a directory in runs_dir -> use a plain name"


def _clip(config: Mapping[str, Any]) -> str | None:
    optimizer = config["module"].get("optimizer")
    if not isinstance(optimizer, Mapping) or "gradient_clip" not in optimizer:
        return (
            "module.optimizer.gradient_clip -> it is not there, and every run says how it clips -> "
            "give it a number in the module's YAML, or null for no clipping"
        )
    clip = optimizer["gradient_clip"]
    for norm in clip.values() if isinstance(clip, Mapping) else (clip,):
        if norm is not None and not (isinstance(norm, int | float) and norm > 0):
            return (
                f"module.optimizer.gradient_clip={norm} -> it is the largest norm of a gradient -> "
                "use a number above 0, or null for no clipping"
            )
    return None


def _spike(config: Mapping[str, Any]) -> str | None:
    factor = config["trainer"]["guard"]["spike"]["factor"]
    if factor is None or (isinstance(factor, int | float) and factor > 1):
        return None
    return (
        f"trainer.guard.spike.factor={factor} -> every loss near the mean would be a spike -> use "
        "more than 1, or null for not watching"
    )


def _notice(config: Mapping[str, Any]) -> str | None:
    notice = str(config["cluster"].get("notice") or "aws")  # not in runs of earlier versions
    if notice not in LOOKS and not notice.startswith(("http://", "https://")):
        return (
            f"cluster.notice={notice} -> neither a cloud nor a url -> use one of "
            f"{', '.join(LOOKS)}, or a url that begins with http:// or https://"
        )
    return None


CHECKS: tuple[Check, ...] = (_choices, _devices, _numbers, _run_name, _clip, _spike, _notice)
