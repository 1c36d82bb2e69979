"""What any rank asks for at the end of a step, known to all of them by one reduction."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer


class StepVote(Callback):
    """Asks every rank the same questions after each optimizer step; one `yes` is enough.

    The answers are known on the host. They travel over gloo also where gradients travel over NCCL,
    so that no step waits for the device.

    Raises:
        ValueError: Ranks have finished their gradients in different orders
            (`trainers.strategies.gradient_order`).
    """

    def __init__(self):
        self.questions: dict[str, Callable[[], bool]] = {}
        """What a rank may ask for, by name; added to before training."""
        self.granted: set[str] = set()
        """What any rank has asked for at the last step."""
        self._group: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Connect over gloo where the ranks are not."""
        if trainer.world_size > 1 and dist.get_backend() != dist.Backend.GLOO:
            timeout = trainer.strategy._timeout  # type: ignore[attr-defined]
            self._group = dist.new_group(backend="gloo", timeout=timeout)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask, where this micro-batch was the step's last."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        order = getattr(trainer.strategy, "gradient_order", None)
        fingerprint = order.fingerprint if order else 0
        answers = [int(ask()) for ask in self.questions.values()]
        votes = [fingerprint, -fingerprint, *answers]
        if trainer.world_size > 1:
            together = torch.tensor(votes)
            dist.all_reduce(together, dist.ReduceOp.MAX, group=self._group)
            votes = together.tolist()
        highest, minus_lowest, *answers = votes
        if highest != -minus_lowest:
            raise ValueError(
                f"strategy -> at step {trainer.global_step} ranks have finished their gradients in "
                "different orders, and ZeRO has added up those of different parameters -> let the "
                "module finish them in one order (docs/adding.md), or use ddp, zero3 or fsdp"
            )
        asked = zip(self.questions, answers, strict=True)
        self.granted = {question for question, answer in asked if answer}
