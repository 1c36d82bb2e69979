"""From a global batch and a world size to micro-batches and accumulation.

The global batch (samples per optimizer step) is what a run chooses and never changes; how it is
split over ranks and forward passes may change at every launch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

TOKENS_KEYS = ("sequence_length", "source_length", "group_tokens")
"""Settings of datamodules that say how many tokens a sample has; one without counts as 1."""
UNITS = ("tokens", "samples", "images")
IMAGES_KEY = "resolution"
"""Setting of datamodules whose samples are images."""


@dataclass(frozen=True)
class RunPlan:
    """What a run is, counted in global samples, and how this launch splits it.

    Attributes:
        batch_samples: Samples per optimizer step over all ranks.
        max_samples: Samples of the whole run; a multiple of `batch_samples`.
        max_steps: Optimizer steps of the whole run.
        tokens_per_sample: Tokens a sample counts for (1 where samples are not made of tokens).
        micro_batch: Samples per rank and forward pass, at this launch's number of ranks.
        grad_accum: Forward passes per rank and optimizer step, likewise.
        unit: What progress is counted in besides: `tokens`, `images`, or only `samples`.
    """

    batch_samples: int
    max_samples: int
    max_steps: int
    tokens_per_sample: int
    micro_batch: int
    grad_accum: int
    unit: str


def plan_run(config: Mapping[str, Any], *, world_size: int) -> RunPlan:
    """Derive the plan from `batch_tokens | batch_samples | batch_images` and `max_... | max_steps`.

    A run's length is rounded down to whole steps. How many tokens a sample has, the datamodule's
    settings say by one of `TOKENS_KEYS`, and that it is an image by `IMAGES_KEY`.

    Raises:
        ValueError: None or several of the alternatives are set, they give no whole step, or the
            batch does not divide among ranks and micro-batches.
    """
    key, tokens_per_sample = _tokens_per_sample(config["datamodule"])
    unit, size = _only_one(config, [f"batch_{name}" for name in UNITS], "the global batch")
    _refuse_images(unit, config)
    if unit == "batch_tokens":
        _refuse_tokens(unit, size, key)
        if size % tokens_per_sample:
            near = max(1, round(size / tokens_per_sample)) * tokens_per_sample
            raise ValueError(
                f"batch_tokens={size} -> a sample has datamodule.{key}="
                f"{tokens_per_sample} tokens, which does not divide it -> "
                f"the nearest that fits is batch_tokens={near}"
            )
        size //= tokens_per_sample

    limits = [*(f"max_{name}" for name in UNITS), "max_steps"]
    limit, amount = _only_one(config, limits, "the run's length")
    _refuse_images(limit, config)
    if limit == "max_tokens":
        _refuse_tokens(limit, amount, key)
    samples = {"max_tokens": amount // tokens_per_sample, "max_steps": amount * size}
    max_steps = samples.get(limit, amount) // size
    if max_steps < 1:
        raise ValueError(
            f"{limit}={amount} -> that is less than one optimizer step of {size} samples "
            f"({size * tokens_per_sample} tokens) -> raise {limit} or lower {unit}"
        )
    accum = grad_accum(size, config["micro_batch"], world_size)
    micro_batch = size // (world_size * accum)
    return RunPlan(
        batch_samples=size,
        max_samples=max_steps * size,
        max_steps=max_steps,
        tokens_per_sample=tokens_per_sample,
        micro_batch=micro_batch,
        grad_accum=accum,
        unit="tokens" if tokens_per_sample > 1 else "images" if _has_images(config) else "samples",
    )


def in_steps(settings: Mapping[str, Any], name: str, batch_samples: int) -> Any:
    """Give a cadence in optimizer steps, which may be set in images.

    Args:
        settings: Have `<name>_images`, which goes first, and `<name>_steps`, or only the former.
        name: Such as `val_every`.
        batch_samples: Images of a step; the cadence is rounded up to whole steps.
    """
    images = settings[f"{name}_images"]
    return settings.get(f"{name}_steps") if images is None else -(-images // batch_samples)


def grad_accum(batch_samples: int, micro_batch: int | None, world_size: int) -> int:
    """Forward passes that each rank makes per optimizer step.

    Args:
        batch_samples: Samples per optimizer step over all ranks.
        micro_batch: Samples per rank and forward pass; None for a rank's whole share at once.
        world_size: Number of ranks.

    Raises:
        ValueError: `batch_samples` is not a multiple of `micro_batch * world_size`.
    """
    if batch_samples % world_size:
        fitting = [size for size in range(1, batch_samples + 1) if batch_samples % size == 0]
        raise ValueError(
            f"trainer.devices x cluster.nodes = {world_size} ranks -> a global batch of "
            f"{batch_samples} samples does not divide among them -> use a number of ranks out of "
            f"{fitting}, or a batch_samples that is a multiple of {world_size}"
        )
    share = batch_samples // world_size
    if micro_batch is None:
        return 1
    if micro_batch < 1 or share % micro_batch:
        fitting = [size for size in range(1, share + 1) if share % size == 0]
        raise ValueError(
            f"micro_batch={micro_batch} -> each of {world_size} rank(s) has {share} of the "
            f"{batch_samples} samples of a step, which micro_batch does not divide -> "
            f"use one of micro_batch={fitting}"
        )
    return share // micro_batch


def give_whole_steps(module: Any, datamodule: Any, num_micro: int) -> int:
    """Let a module that optimizes manually get the micro-batches of a step as one list.

    For modules with several optimizers, each of which goes through the micro-batches of a step.

    Returns:
        Micro-batches that Lightning is to accumulate over: 1 for such a module, else `num_micro`.
    """
    if module.automatic_optimization:
        return num_micro
    make_loader = datamodule.train_dataloader
    datamodule.train_dataloader = lambda: _WholeSteps(make_loader(), num_micro)
    return 1


@dataclass(frozen=True)
class _WholeSteps:
    loader: Any
    num_micro: int

    def __len__(self) -> int:
        return len(self.loader) // self.num_micro

    def __iter__(self) -> Iterator[list[Any]]:
        batches = iter(self.loader)
        while step := list(islice(batches, self.num_micro)):
            yield step


def _tokens_per_sample(datamodule: Mapping[str, Any]) -> tuple[str, int]:
    found = [(key, datamodule[key]) for key in TOKENS_KEYS if datamodule.get(key)]
    return found[0] if found else ("", 1)


def _refuse_tokens(unit: str, size: int, key: str) -> None:
    if not key:
        raise ValueError(
            f"{unit}={size} -> samples of this datamodule have no fixed number of tokens -> use "
            f"{unit.split('_')[0]}_samples, or _images (of text datamodule.group_tokens makes "
            "groups of as many tokens)"
        )


def _has_images(config: Mapping[str, Any]) -> bool:
    return bool(config["datamodule"].get(IMAGES_KEY))


def _refuse_images(key: str, config: Mapping[str, Any]) -> None:
    if key.endswith("_images") and not _has_images(config):
        raise ValueError(
            f"{key}={config[key]} -> samples of this datamodule are no images -> use "
            f"{key.removesuffix('images')}samples"
        )


def _only_one(config: Mapping[str, Any], keys: Sequence[str], what: str) -> tuple[str, int]:
    given = {key: config[key] for key in keys if config[key] is not None}
    if len(given) != 1:
        chosen = ", ".join(f"{key}={value}" for key, value in given.items()) or "nothing"
        raise ValueError(
            f"{chosen} -> {what} must be given by exactly one of {', '.join(keys)} -> "
            f"set one and leave the others at null"
        )
    key, value = next(iter(given.items()))
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key}={value!r} -> {what} is a whole number above 0 -> give one")
    return key, value
