"""Steps that are not to be taken: a loss or gradient that is no number, a loss that jumps."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from trainers.checkpoint import read_last


@dataclass(frozen=True)
class Judged:
    """A step of a part, as it was judged; tensors are 0-d and on the device."""

    step: int
    part: str
    update: str
    """The part and the number of its update in the round, from 1."""
    loss: Tensor
    """Of this rank."""
    norm: Tensor
    is_spike: Tensor
    usual: Tensor
    """What the loss was compared with to find a spike; 0 where spikes are not watched."""


class StepGuard(Callback):
    """Judges each step of each part before it is taken, and ends the run or leaves the step out.

    The strategy calls it with a part's loss on this rank and the norm of its whole gradient. The
    answer is computed on the device and nobody waits for it; `check`, which runs where a row is
    logged and before anything is saved, reads back what has been judged since. Every rank decides
    from what all ranks know, so that they decide the same: the norm, which is not finite as soon as
    one rank's loss is not; and, for spikes, the mean loss, which costs a small reduction a step.

    Under fp16 a gradient that is not finite is how the loss scale is found: such steps are left out
    by the loss scaling itself and counted here, and only a loss that is not finite is a failure.

    Args:
        nonfinite: `stop` or `skip`.
        spike: `factor`, `action` and `memory_steps`, as in `conf/trainer/default.yaml`.
        max_skips: Steps that may be left out in a row; those of a part that are not the same in
            each round (of its loss, of a penalty that is due now and then) are rows of their own.
    """

    def __init__(self, *, nonfinite: str, spike: Mapping[str, Any], max_skips: int):
        self.nonfinite, self.max_skips = nonfinite, max_skips
        self.factor, self.spike_action = spike["factor"], spike["action"]
        self.memory_steps = spike["memory_steps"]
        self.num_skipped: Counter[str] = Counter()
        """Steps left out so far, by part."""
        self.skipped_in_a_row: Counter[str] = Counter()
        """Since one was taken, by `Judged.update`: updates in a round may minimise other things."""
        # By the same: running mean of the loss, number of losses.
        self._levels: dict[str, Any] = {}
        self._updates = (0, Counter[str]())  # of the step that is judged, by part
        self._has_stopped: dict[str, Tensor] = {}
        self._unread: list[Judged] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember whose steps these are."""
        self._trainer = trainer

    @torch.no_grad()
    def __call__(self, part: str, loss: Tensor, norm: Tensor) -> Tensor:
        """Judge a step.

        Args:
            part: Name of the part that is about to step.
            loss: This rank's, over all micro-batches.
            norm: Of the whole gradient, the same on all ranks.

        Returns:
            Whether not to step; a bool scalar on the device, the same on all ranks.
        """
        is_bad = ~norm.isfinite()
        usual = is_spike = torch.zeros_like(norm, dtype=torch.bool)
        step = self._trainer.global_step + 1
        if self._updates[0] != step:
            self._updates = (step, Counter())
        self._updates[1][part] += 1
        update = f"{part}/{self._updates[1][part]}"
        if self.factor is not None:
            is_spike, usual = self._judge_loss(update, loss.detach(), ~is_bad)
        values = (loss.detach(), norm.detach(), is_spike, usual)
        self._unread.append(Judged(step, part, update, *values))
        ends = [is_spike] if self.spike_action == "stop" and self.factor is not None else []
        ends += [is_bad] if self.nonfinite == "stop" and not self._scales_loss else []
        for end in ends:  # nothing is changed between a step that ends the run and its `check`
            before = self._has_stopped.get(part)
            self._has_stopped[part] = end if before is None else before | end
        stopped = self._has_stopped.get(part)
        veto = is_bad if self.factor is None else is_bad | is_spike
        return veto if stopped is None else veto | stopped

    def _judge_loss(self, update: str, loss: Tensor, is_finite: Tensor) -> tuple[Tensor, Tensor]:
        """Compare a loss with the running mean of its magnitude before, and move the mean.

        It is a plain mean until `memory_steps` losses are in it, and forgets exponentially then.
        """
        if self._trainer.world_size > 1:
            loss = loss.clone()
            torch.distributed.all_reduce(loss)
            loss /= self._trainer.world_size
        magnitude = loss.abs().float()
        mean, count = torch.as_tensor(
            self._levels.get(update, (0.0, 0.0)), dtype=torch.float32, device=loss.device
        )
        is_spike = (magnitude > self.factor * mean) & (count >= self.memory_steps) & is_finite
        is_usual = is_finite & magnitude.isfinite() & ~is_spike
        later = count + is_usual
        moved = mean + (magnitude - mean) / later.clamp(1, self.memory_steps)
        self._levels[update] = torch.stack([torch.where(is_usual, moved, mean), later])
        return is_spike, mean

    @property
    def _scales_loss(self) -> bool:
        return self._trainer.strategy.dtype == torch.float16  # type: ignore[attr-defined]

    def check(self, trainer: Trainer) -> None:
        """Read back what was judged since the last time; on all ranks, after the same step.

        Raises:
            FloatingPointError: A step ends the run; the same on all ranks.
        """
        judged, self._unread = self._unread, []
        if not judged:
            return
        columns = [
            torch.stack([value.float() for value in column])
            for column in zip(*((j.loss, j.norm, j.is_spike, j.usual) for j in judged), strict=True)
        ]
        # [ranks, steps]: each rank knows its own loss only.
        losses = trainer.strategy.all_gather(columns[0]).reshape(-1, len(judged)).tolist()
        _, norms, are_spikes, usual = torch.stack(columns).tolist()
        for index, each in enumerate(judged):
            ranks = [rank for rank, row in enumerate(losses) if not math.isfinite(row[index])]
            mean = sum(row[index] for row in losses) / len(losses)
            jump = (mean, usual[index]) if are_spikes[index] else None
            self._count(each, ranks, math.isfinite(norms[index]), jump)

    def _count(
        self, judged: Judged, ranks: list[int], is_finite: bool, jump: tuple[float, float] | None
    ) -> None:
        """Count a step that was left out, or end the run."""
        name = f" of part `{judged.part}`" if len(self._trainer.optimizers) > 1 else ""
        if ranks:
            whose = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
            what = f"the loss{name} on {whose} is not finite at step {judged.step}"
        else:
            what = f"the gradient{name} is not finite at step {judged.step}, while the loss is"
        if self.nonfinite == "stop" and (ranks or not (is_finite or self._scales_loss)):
            raise self._diverged(
                "trainer.guard.nonfinite=stop", what, "trainer.guard.nonfinite=skip"
            )
        if jump is not None:
            loss, usual = jump
            what = f"the loss{name} at step {judged.step} is {loss:.4g}, where {usual:.4g} is usual"
            if self.spike_action == "stop":
                setting = f"trainer.guard.spike.factor={self.factor}"
                raise self._diverged(setting, what, "trainer.guard.spike.action=skip")
        if is_finite and jump is None:
            self.skipped_in_a_row[judged.update] = 0
            return
        self.num_skipped[judged.part] += 1
        self.skipped_in_a_row[judged.update] += 1
        if self.skipped_in_a_row[judged.update] > self.max_skips:
            what = f"more steps than that in a row were left out; {what}"
            raise self._diverged(f"trainer.guard.max_skips={self.max_skips}", what, "a larger one")

    def _diverged(self, setting: str, what: str, patience: str) -> FloatingPointError:
        last = read_last(Path(self._trainer.default_root_dir, "checkpoints"))
        remedy = f"continue it from its last checkpoint ({last}) with {patience}; or"
        return FloatingPointError(
            f"{setting} -> {what}: the run diverged -> {remedy if last else 'none is saved, so'}, "
            "under another run.name, lower module.optimizer.lr, lengthen the warm-up or choose "
            "precision=bf16 or fp32"
        )

    def row(self) -> dict[str, float]:
        """What a logged row says: the number of steps left out since the run began."""
        return {"train/skipped_steps": float(self.num_skipped.total())}

    def state_dict(self) -> dict[str, Any]:
        """Counts and running means, exactly."""
        levels = {name: torch.as_tensor(level).tolist() for name, level in self._levels.items()}
        return {
            "num_skipped": dict(self.num_skipped),
            "skipped_in_a_row": dict(self.skipped_in_a_row),
            "levels": levels,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.num_skipped = Counter(state_dict["num_skipped"])
        self.skipped_in_a_row = Counter(_by_update(state_dict["skipped_in_a_row"]))
        self._levels = _by_update(state_dict["levels"])


def _by_update(state: Mapping[str, Any]) -> dict[str, Any]:
    """State that earlier versions kept by part alone."""
    return {name if "/" in name else f"{name}/1": value for name, value in state.items()}
