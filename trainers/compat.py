"""Which settings can go together, checked before a device is touched. One table, one message form.

Every rule reads the composed configuration and the machine, and answers with a message
`key=value -> why it cannot work -> what to change`, or with None.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from trainers.activation_checkpointing import ActivationCheckpointing
from trainers.callbacks.step_guard import ACTIONS

PRECISIONS = ("fp32", "bf16", "fp16", "auto")
ACCELERATORS = ("auto", "cpu", "cuda")

Rule = Callable[[Mapping[str, Any], int], str | None]


def check(config: Mapping[str, Any], world_size: int) -> None:
    """Apply every rule.

    Args:
        config: The composed configuration.
        world_size: Ranks that will run.

    Raises:
        ValueError: The first rule that is broken, in the order of `RULES`.
    """
    for rule in RULES:
        if message := rule(config, world_size):
            raise ValueError(message)
    ActivationCheckpointing(config["activation_checkpointing"])


def resolve_precision(config: Mapping[str, Any]) -> str:
    """`auto` is bf16 where the hardware multiplies it faster (CUDA, AMX, AVX-512 BF16), else fp32.

    On a CUDA device without bf16 it is fp16.
    """
    if config["precision"] != "auto":
        return config["precision"]
    if _uses_cuda(config):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
        return "bf16"
    return "fp32"


def _known_precision(config: Mapping[str, Any], world_size: int) -> str | None:
    if config["precision"] in PRECISIONS:
        return None
    return f"precision={config['precision']} -> unknown -> use one of {', '.join(PRECISIONS)}"


def _known_accelerator(config: Mapping[str, Any], world_size: int) -> str | None:
    accelerator = config["trainer"]["accelerator"]
    if accelerator not in ACCELERATORS:
        names = ", ".join(ACCELERATORS)
        return f"trainer.accelerator={accelerator} -> unknown -> use one of {names}"
    if accelerator == "cuda" and not torch.cuda.is_available():
        return (
            "trainer.accelerator=cuda -> torch sees no CUDA device on this machine -> "
            "use trainer.accelerator=auto, or look at `nvidia-smi` and the installed torch"
        )
    return None


def _enough_devices(config: Mapping[str, Any], world_size: int) -> str | None:
    devices = config["trainer"]["devices"]
    if not isinstance(devices, int) or devices < 1:
        return f"trainer.devices={devices} -> a number of devices per node -> use 1 or more"
    if _uses_cuda(config) and devices > torch.cuda.device_count():
        return (
            f"trainer.devices={devices} -> this machine has {torch.cuda.device_count()} CUDA "
            f"device(s) -> lower it, or use trainer.accelerator=cpu"
        )
    return None


def _single_is_alone(config: Mapping[str, Any], world_size: int) -> str | None:
    if config["strategy"]["name"] != "single" or world_size == 1:
        return None
    return (
        f"strategy=single -> it drives one device and there are {world_size} ranks "
        f"(trainer.devices x cluster.nodes) -> use strategy=ddp"
    )


def _fp16_has_loss_scaling(config: Mapping[str, Any], world_size: int) -> str | None:
    if config["precision"] != "fp16" or _uses_cuda(config):
        return None
    return "precision=fp16 -> loss scaling needs a CUDA device -> use precision=bf16 or fp32"


def _counts_are_positive(config: Mapping[str, Any], world_size: int) -> str | None:
    required = {"trainer": ("val_every_steps", "log_every_steps"), "checkpoints": ("keep_last",)}
    optional = {"checkpoints": ("every_steps", "keep_every_steps")}
    for keys, is_optional in ((required, False), (optional, True)):
        for node, names in keys.items():
            for name in names:
                value = config[node][name]
                if is_optional and value is None:
                    continue
                if not isinstance(value, int) or value < 1:
                    never = " or null for never" if is_optional else ""
                    return f"{node}.{name}={value} -> it is a whole number -> use 1 or more{never}"
    return None


def _nodes_have_ranks(config: Mapping[str, Any], world_size: int) -> str | None:
    nodes = config["cluster"]["nodes"]
    if nodes == 1 or "RANK" in os.environ:
        return None
    return (
        f"cluster.nodes={nodes} -> this command starts ranks on this machine only -> start it "
        f"with torchrun on every node"
    )


def _run_has_a_name(config: Mapping[str, Any], world_size: int) -> str | None:
    name = str(config["run"]["name"] or "")
    if name and not set(name) & set("/\\\0") and name not in (".", ".."):
        return None
    return f"run.name={name} -> it names a directory in runs_dir -> use a plain name"


def _failures_are_judged(config: Mapping[str, Any], world_size: int) -> str | None:
    options = config["trainer"]
    guard, spike = options["guard"], options["guard"]["spike"]
    actions = {"guard.nonfinite": guard["nonfinite"], "guard.spike.action": spike["action"]}
    for key, action in actions.items():
        if action not in ACTIONS:
            return f"trainer.{key}={action} -> unknown -> use one of {', '.join(ACTIONS)}"
    if spike["factor"] is not None and spike["factor"] <= 1:
        return (
            f"trainer.guard.spike.factor={spike['factor']} -> every loss near the mean would be a "
            f"spike -> use more than 1, or null for not watching"
        )
    lowest = {
        "timeout_s": (options["timeout_s"], 1),
        "guard.spike.memory_steps": (spike["memory_steps"], 1),
        "guard.max_skips": (guard["max_skips"], 0),
    }
    for key, (value, least) in lowest.items():
        if not isinstance(value, int | float) or value < least:
            return f"trainer.{key}={value} -> it is a number -> use {least} or more"
    return None


def _uses_cuda(config: Mapping[str, Any]) -> bool:
    return config["trainer"]["accelerator"] != "cpu" and torch.cuda.is_available()


RULES: tuple[Rule, ...] = (
    _known_precision,
    _known_accelerator,
    _enough_devices,
    _single_is_alone,
    _fp16_has_loss_scaling,
    _counts_are_positive,
    _nodes_have_ranks,
    _run_has_a_name,
    _failures_are_judged,
)
