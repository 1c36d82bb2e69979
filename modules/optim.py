"""Optimizers and learning-rate schedules, for every family.

Schedules count samples, never optimizer calls, so that a change of world size or of the
micro-batch does not bend them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from modules.adafactor import Adafactor
from modules.adamw_rms import AdamWRMS
from modules.muon import MuonAdamW, ParameterRoles
from modules.presets import is_number

OPTIMIZERS = ("adamw", "muon", "sgd", "adamw_rms", "adafactor")
SCHEDULES = ("constant", "linear", "cosine", "wsd", "inverse_sqrt")


def check_settings(
    optimizer: Mapping[str, Any], prefix: str = "module.optimizer"
) -> dict[str, Any]:
    """Check the values of `module.optimizer`, long before an optimizer can be built.

    Args:
        optimizer: Arguments of `build_optimizer`, and `gradient_clip`, which the trainer reads.
        prefix: Where they are in the configuration.

    Returns:
        The arguments of `build_optimizer`.

    Raises:
        ValueError: One that has to be a number is none, or is below 0.
    """
    for name, value in optimizer.items():
        key = f"{prefix}.{name}"
        if isinstance(value, Mapping):
            check_settings(value, key)
        elif name == "betas":
            is_pair = isinstance(value, Sequence) and len(value) == 2
            if not is_pair or not all(is_number(beta) and 0 <= beta < 1 for beta in value):
                raise ValueError(
                    f"{key}={value} -> it is two numbers from 0 to 1 -> use two such as [0.9, 0.95]"
                )
        elif name in ("name", "gradient_clip") or isinstance(value, bool):
            continue
        elif not is_number(value) or value < 0:
            raise ValueError(f"{key}={value} -> it is a number -> use 0 or more")
    return {name: value for name, value in optimizer.items() if name != "gradient_clip"}


def build_optimizer(
    roles: ParameterRoles,
    *,
    name: str,
    lr: float,
    weight_decay: float,
    adamw: Mapping[str, Any],
    muon: Mapping[str, Any],
    sgd: Mapping[str, Any],
    adamw_rms: Mapping[str, Any],
    adafactor: Mapping[str, Any],
) -> torch.optim.Optimizer:
    """Build the optimizer of `module.optimizer`.

    Args:
        roles: Parameters by role; those without gradients are left out. Every optimizer here is
            fused or reads `found_inf` like a fused one, so that a step can be called off on the
            device.
        name: One of `OPTIMIZERS`.
        lr: Peak learning rate; under `muon` that of the matrices, under `adamw_rms` and
            `adafactor` relative to the root mean square of each tensor.
        weight_decay: Decoupled, or L2 (`sgd`); applies to parameters of two or more dimensions, and
            under `muon` to the matrices only.
        adamw: `betas` and `eps`; under `muon` too, for what is not a matrix, and `adamw_rms`.
        muon: `momentum`, and `embedding_lr`, `head_lr`, `other_lr` of the AdamW part.
        sgd: `momentum`.
        adamw_rms: `min_rms`, as `modules.adamw_rms.AdamWRMS`.
        adafactor: As `modules.adafactor.Adafactor`.

    Raises:
        ValueError: The name is unknown, or a matrix is not 2-D under `muon`.
    """
    trained = {
        role: [p for p in parameters if p.requires_grad] for role, parameters in roles.items()
    }
    everything = [p for parameters in trained.values() for p in parameters]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in everything if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in everything if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    moments: dict[str, Any] = {"betas": tuple(adamw["betas"]), "eps": adamw["eps"]}
    if name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=lr, **moments, fused=True)
        # Under plain Lightning: fused optimizers offer to unscale fp16 gradients themselves, and it
        # then refuses to clip, in bf16 as well.
        optimizer._step_supports_amp_scaling = False  # pyright: ignore[reportAttributeAccessIssue]
        return optimizer
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=sgd["momentum"], fused=True)
    if name == "muon":
        rates = {role: muon[f"{role}_lr"] for role in ("embedding", "head", "other")}
        momentum, lrs = muon["momentum"], {"matrix": lr, **rates}
        return MuonAdamW(trained, lr=lrs, momentum=momentum, weight_decay=weight_decay, **moments)
    if name == "adamw_rms":
        return AdamWRMS(groups, lr=lr, **moments, **adamw_rms)
    if name == "adafactor":
        return Adafactor(groups, lr=lr, **adafactor)
    raise ValueError(f"module.optimizer.name={name} -> unknown -> choose {_any_of(OPTIMIZERS)}")


def _any_of(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def build_schedule(
    optimizer: torch.optim.Optimizer, schedule: "Schedule", batch_samples: int
) -> LambdaLR:
    """Build the scheduler of `module.schedule`, to be stepped once per optimizer step.

    Every group's rate is its peak times the schedule's multiplier at the samples seen.

    Args:
        optimizer: At its peak rates.
        schedule: Of the run.
        batch_samples: Global samples per optimizer step.
    """

    # A closure rather than the object: LambdaLR saves an object's attributes in checkpoints.
    def multiplier(step: int) -> float:
        return schedule.multiplier(step * batch_samples)

    return LambdaLR(optimizer, multiplier)


class Schedule:
    """Learning rate over its peak, as a function of the samples seen before a step.

    At p samples, with batch G, warm-up w, end m, and final fraction f, it is (p + G) / w while
    that is below 1 (so that the first step is not lost at zero), and then, x = (p - w) / (m - w),

    * `constant`: 1
    * `linear`: 1 - (1 - f) x
    * `cosine`: f + (1 - f) (1 + cos(pi x)) / 2, Loshchilov and Hutter 2016, arXiv 1608.03983,
      equation 5, without restarts
    * `wsd`: 1 until m - d samples, then linear in (p - m + d) / d from 1 to f; warm-up, stable,
      decay, Hu et al. 2024, arXiv 2404.06395, section 4
    * `inverse_sqrt`: sqrt(w / max(p, w)), Vaswani et al. 2017, arXiv 1706.03762, equation 3, whose
      peak is its (width * w)^-0.5; no m or f

    Args:
        plan: `batch_samples`, `max_samples` and `tokens_per_sample` of the run.
        name: One of the five above.
        warmup_samples: w; or None and `warmup_tokens`.
        warmup_tokens: w in tokens.
        decay_samples: d, for `wsd` only; or None and `decay_tokens`.
        decay_tokens: d in tokens.
        final_lr_fraction: f; None under `constant` and `inverse_sqrt`, which have no end to reach.

    Raises:
        ValueError: The name is unknown, a number is none, a pair has both or neither key set, a key
            is set that the schedule does not use, warm-up and decay are longer than the run, or
            `inverse_sqrt` has no warm-up.
    """

    def __init__(
        self,
        plan: Mapping[str, int],
        *,
        name: str,
        warmup_samples: int | None,
        warmup_tokens: int | None,
        decay_samples: int | None,
        decay_tokens: int | None,
        final_lr_fraction: float | None,
    ):
        if name not in SCHEDULES:
            raise ValueError(
                f"module.schedule.name={name} -> unknown -> choose {_any_of(SCHEDULES)}"
            )
        numbers = {
            "warmup_samples": warmup_samples,
            "warmup_tokens": warmup_tokens,
            "decay_samples": decay_samples,
            "decay_tokens": decay_tokens,
            "final_lr_fraction": final_lr_fraction,
        }
        for key, value in numbers.items():
            if value is not None and not (is_number(value) and value >= 0):
                raise ValueError(
                    f"module.schedule.{key}={value} -> it is a number -> use 0 or more"
                )
        self.name, self.plan = name, plan
        self.warmup = self._samples("warmup", warmup_samples, warmup_tokens)
        self.decay = 0.0
        if name == "wsd":
            self.decay = self._samples("decay", decay_samples, decay_tokens)
        else:
            self._refuse(decay_samples=decay_samples, decay_tokens=decay_tokens)
        if name in ("constant", "inverse_sqrt"):
            self._refuse(final_lr_fraction=final_lr_fraction)
        elif final_lr_fraction is None:
            raise ValueError(
                f"module.schedule.final_lr_fraction=null -> {name} has no end to reach -> "
                f"set it, to 0 for decaying to nothing"
            )
        self.final = 1.0 if final_lr_fraction is None else final_lr_fraction
        if name == "inverse_sqrt" and not self.warmup:
            raise ValueError(
                "module.schedule: warm-up of 0 samples -> inverse_sqrt falls from where warm-up "
                "ends, and would be 0 -> set module.schedule.warmup_samples or warmup_tokens"
            )
        if self.warmup + self.decay > plan["max_samples"]:
            raise ValueError(
                f"module.schedule: warm-up of {self.warmup:g} samples and decay of {self.decay:g} "
                f"-> they do not fit a run of {plan['max_samples']} samples -> shorten "
                f"module.schedule.warmup_* and decay_*, or train longer"
            )

    def _samples(self, key: str, samples: int | None, tokens: int | None) -> float:
        if (samples is None) == (tokens is None):
            raise ValueError(
                f"module.schedule.{key}_samples={samples} {key}_tokens={tokens} -> "
                "the length needs one unit -> set one of them and leave the other null"
            )
        return samples if samples is not None else (tokens or 0) / self.plan["tokens_per_sample"]

    def _refuse(self, **unused: float | None) -> None:
        for key, value in unused.items():
            if value is not None:
                raise ValueError(
                    f"module.schedule.{key}={value} -> it has no meaning for "
                    f"module.schedule.name={self.name} -> set it to null"
                )

    def multiplier(self, samples: float) -> float:
        """Return the rate over its peak for the step that starts after `samples` samples."""
        ramp = samples + self.plan["batch_samples"]
        if ramp < self.warmup:
            return ramp / self.warmup
        if self.name == "inverse_sqrt":
            return math.sqrt(self.warmup / max(samples, self.warmup))
        end = self.plan["max_samples"]
        if self.name == "wsd":
            start, length = end - self.decay, self.decay
        else:
            start, length = self.warmup, end - self.warmup
        x = min(max((samples - start) / length, 0.0), 1.0) if length else 0.0
        if self.name == "cosine":
            x = (1 - math.cos(math.pi * x)) / 2
        return 1 - (1 - self.final) * x
