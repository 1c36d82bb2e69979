"""Which settings can go together: rules that are checked before a device is touched.

Each rule names the combination it is about (module, strategy, precision, optimizer) and what it
says of it, `key=value -> why -> what to change`; its function gives the facts in that message, or
None where a launch is no such combination. Most refuse; a few are notes of what is arranged
differently from what was asked. What a value may be by itself is in `trainers/limits.py`.

`docs/parallelism.md` has the rules as a table, which `python -m trainers.compat` prints.
"""

import os
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from trainers.batch_plan import IMAGES_KEY
from trainers.limits import check_machine, check_values
from trainers.rules import RULES, Facts, Launch, is_submission, rule
from trainers.strategies.deepspeed_settings import DECIDED_ELSEWHERE, KNOWN, UNUSABLE

ZERO = "zero1, zero2, zero3, zero3_offload"
ZERO_KEY = "strategy.make.config.zero_optimization"
IMAGE_CADENCES = {
    "trainer.val_every_images": "use trainer.val_every_steps",
    "trainer.pictures_every_images": "leave it at null, there are no pictures",
    "checkpoints.every_images": "use checkpoints.every_steps",
    "checkpoints.keep_every_images": "use checkpoints.keep_every_steps",
}
"""Cadences in images, and what to do about one where there are none."""
HIGHEST_TWICE = 2  # stage of ZeRO at which a gradient can be differentiated once more


def check(config: Mapping[str, Any], world_size: int, module: Any = None) -> list[str]:
    """Check every value and every combination.

    Args:
        config: The composed configuration.
        world_size: Ranks that will run.
        module: The LightningModule, once it is built.

    Returns:
        Notes on what will be arranged differently from what was asked.

    Raises:
        ValueError: The first value or combination that cannot be.
    """
    check_values(config)
    check_machine(config)
    launch, notes = Launch(config, world_size, module), []
    for each in RULES:
        if (facts := each.find(launch)) is None:
            continue
        message = each.message.format(**facts)
        if each.is_refused:
            raise ValueError(message)
        notes.append(message)
    return notes


def table() -> str:
    """The rules in Markdown; `<...>` stands for what a launch fills in."""
    rows = ["| module | strategy | precision | optimizer | | message |", "|" + "---|" * 6]
    for each in RULES:
        message = each.message.replace("{", "<").replace("}", ">")
        kind = "refused" if each.is_refused else "noted"
        cells = (each.module, each.strategy, each.precision, each.optimizer, kind, f"`{message}`")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


@rule(
    "strategy=single -> it drives one device and there are {ranks} ranks (trainer.devices x "
    "cluster.nodes) -> use strategy=ddp, or zero1 to zero3 or fsdp to divide the model's state",
    strategy="single",
)
def _single_among_many(launch: Launch) -> Facts:
    is_alone = launch.config["strategy"]["name"] != "single" or launch.ranks == 1
    return None if is_alone else {"ranks": launch.ranks}


@rule(
    "cluster.nodes={nodes} -> this command starts ranks on this machine only -> run it on every "
    "node with cluster.rendezvous=<one of them>:29500, or by torchrun or srun, or cluster=slurm"
)
def _nodes_without_ranks(launch: Launch) -> Facts:
    nodes = launch.config["cluster"]["nodes"]
    has_starter = "RANK" in os.environ or is_submission(launch.config)
    return None if nodes == 1 or has_starter else {"nodes": nodes}


@rule(
    "strategy={strategy} precision=fp16 -> DeepSpeed scales losses of fp16 parameters only -> they "
    "are kept in fp16 beside fp32 masters, as strategy.make.parameters=low asks for",
    strategy=ZERO,
    precision="fp16",
    is_refused=False,
)
def _fp16_parameters(launch: Launch) -> Facts:
    is_asked = launch.make.get("parameters") == "low" or launch.config["precision"] != "fp16"
    is_zero = "stage" in launch.make
    return {"strategy": launch.config["strategy"]["name"]} if is_zero and not is_asked else None


@rule(
    "strategy.make.parameters=low precision=fp32 -> low is the precision of the run -> parameters "
    "are fp32, as without it",
    strategy=f"{ZERO}, fsdp",
    precision="fp32",
    is_refused=False,
)
def _low_is_fp32(launch: Launch) -> Facts:
    is_low = launch.make.get("parameters") == "low" and launch.config["precision"] == "fp32"
    return {} if is_low else None


@rule(
    "strategy=fsdp -> {module} has no `blocks` to gather one at a time (docs/adding.md) -> every "
    "rank gathers all weights of a network while it is at work",
    module="without `blocks`",
    strategy="fsdp",
    is_refused=False,
)
def _gathered_at_once(launch: Launch) -> Facts:
    is_fsdp = launch.config["strategy"]["name"] == "fsdp"
    if launch.module is None or not is_fsdp or getattr(launch.module, "blocks", None):
        return None
    return {"module": type(launch.module).__name__}


@rule(
    "strategy.make.shard_size={size} -> {ranks} rank(s) do not divide into groups of that size -> "
    "use a divisor, or null for one group",
    strategy="fsdp",
)
def _uneven_groups(launch: Launch) -> Facts:
    size = launch.make.get("shard_size")
    is_even = size is None or (isinstance(size, int) and size > 0 and launch.ranks % size == 0)
    return None if is_even else {"size": size, "ranks": launch.ranks}


@rule(
    "strategy.make.config.{key} -> DeepSpeed has no such setting and would ignore it -> {remedy}",
    strategy=ZERO,
)
def _unknown_deepspeed_key(launch: Launch) -> Facts:
    unknown = [key for key in launch.make.get("config") or () if key not in KNOWN]
    if not unknown:
        return None
    near = get_close_matches(unknown[0], KNOWN, 1)
    name = DECIDED_ELSEWHERE.get(near[0], near[0]) if near else None
    return {"key": unknown[0], "remedy": f"use {name}" if name else "leave it out"}


@rule(
    "strategy.make.config.{key} -> the run decides that for DeepSpeed -> leave it out and use "
    "{ours}",
    strategy=ZERO,
)
def _deepspeed_key_of_ours(launch: Launch) -> Facts:
    keys = [key for key in DECIDED_ELSEWHERE if key in launch.deepspeed]
    return {"key": keys[0], "ours": DECIDED_ELSEWHERE[keys[0]]} if keys else None


@rule("strategy.make.config.{key} -> {why} -> leave it out", strategy=ZERO)
def _unusable_key(launch: Launch) -> Facts:
    keys = [key for key in UNUSABLE if launch.deepspeed.get(key)]
    return {"key": keys[0], "why": UNUSABLE[keys[0]]} if keys else None


@rule(
    f"{ZERO_KEY}.{{key}}.device=nvme -> checkpoints and Muon look for masters and state in memory "
    "-> use device=cpu",
    strategy=ZERO,
    optimizer="any, muon too",
)
def _offload_to_disk(launch: Launch) -> Facts:
    for key in ("offload_optimizer", "offload_param"):
        if (launch.zero.get(key) or {}).get("device") == "nvme":
            return {"key": key}
    return None


@rule(
    f"{ZERO_KEY}.offload_param -> at stage {{stage}} every rank computes with whole parameters -> "
    "use strategy=zero3_offload, or leave it out",
    strategy="zero1, zero2",
)
def _offload_of_whole_parameters(launch: Launch) -> Facts:
    is_whole = launch.make.get("stage", 3) < 3 and launch.zero.get("offload_param")
    return {"stage": launch.make["stage"]} if is_whole else None


@rule(
    "strategy.make.part_stages.{part} -> the module has no such part -> use one of {parts}",
    module="with `parts`",
    strategy=ZERO,
)
def _stage_of_no_part(launch: Launch) -> Facts:
    unknown = [part for part in launch.make.get("part_stages") or () if part not in launch.parts]
    if launch.module is None or not unknown:
        return None
    return {"part": unknown[0], "parts": ", ".join(launch.parts)}


@rule(
    "strategy.make.part_stages.{part}={stage} -> its gradients are differentiated once more, when "
    f"that stage has given its parameters back -> use {HIGHEST_TWICE} or less",
    module="with `double_backward`",
    strategy=ZERO,
)
def _stage_too_high(launch: Launch) -> Facts:
    for part, stage in (launch.make.get("part_stages") or {}).items():
        if part in launch.twice and stage > HIGHEST_TWICE:
            return {"part": part, "stage": stage}
    return None


@rule(
    "strategy={strategy} -> gradients of {parts} are differentiated once more, when stage 3 has "
    f"given its parameters back -> stage {HIGHEST_TWICE} is used there",
    module="with `double_backward`",
    strategy="zero3, zero3_offload",
    is_refused=False,
)
def _stage_lowered(launch: Launch) -> Facts:
    parts = [part for part in launch.twice if part not in (launch.make.get("part_stages") or {})]
    if launch.make.get("stage", 0) <= HIGHEST_TWICE or not parts:
        return None
    return {"strategy": launch.config["strategy"]["name"], "parts": ", ".join(parts)}


@rule(
    "activation_checkpointing=selective -> kept results serve one backward pass, and gradients of "
    "{parts} are differentiated once more -> blocks there are recomputed in full",
    module="with `double_backward`",
    is_refused=False,
)
def _results_for_one_backward(launch: Launch) -> Facts:
    is_kept = launch.config["activation_checkpointing"] == "selective" and launch.twice
    return {"parts": ", ".join(launch.twice)} if is_kept else None


@rule(
    "activation_checkpointing={mode} -> {module} has no `blocks` -> give it that property "
    "(docs/adding.md), or use none",
    module="without `blocks`",
)
def _recomputation_of_nothing(launch: Launch) -> Facts:
    mode = launch.config["activation_checkpointing"]
    if launch.module is None or mode == "none" or hasattr(launch.module, "blocks"):
        return None
    return {"mode": mode, "module": type(launch.module).__name__}


@rule(
    "module={module} -> it has the parts {parts}, and Lightning trains only one by itself -> set "
    "self.automatic_optimization = False and step each optimizer (docs/adding.md)",
    module="with `parts`",
)
def _parts_left_to_lightning(launch: Launch) -> Facts:
    if len(launch.parts) == 1 or not launch.module.automatic_optimization:
        return None
    return {"module": type(launch.module).__name__, "parts": ", ".join(launch.parts)}


@rule(
    "{key}={images} -> samples of this datamodule are no images -> {remedy}",
)
def _images_of_none(launch: Launch) -> Facts:
    if launch.config["datamodule"].get(IMAGES_KEY):
        return None
    for key, remedy in IMAGE_CADENCES.items():
        node, name = key.split(".")
        if (images := launch.config[node].get(name)) is not None:
            return {"key": key, "images": images, "remedy": remedy}
    return None


@rule(
    "module.optimizer.gradient_clip of {names} -> the module's parts are {parts} -> give each a "
    "norm or null, or one number for all",
    module="with `parts`",
)
def _clip_of_other_parts(launch: Launch) -> Facts:
    if launch.module is None:
        return None
    clip = launch.config["module"]["optimizer"]["gradient_clip"]
    if not isinstance(clip, Mapping) or {*clip} == {*launch.parts}:
        return None
    return {"names": ", ".join(clip), "parts": ", ".join(launch.parts)}


if __name__ == "__main__":
    print(table())
