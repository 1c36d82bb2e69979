"""Two small networks with everything about a GAN that strategies stumble over.

Alternating updates, R1 (a penalty on a gradient, differentiated again), clipping by part, a moving
average of the generator, accumulation. No batch norm and no dropout, so that any number of ranks
must give the same numbers. Its noise belongs to the data, as a function of the sample.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn.functional import linear, softplus
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR

NOISE, POINT, WIDTH = 4, 6, 16


class Linear(nn.Linear):
    """A linear map with weights taken in the dtype of the input.

    A strategy may keep them in low precision, and a penalty is computed in fp32.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Transform `input` [B, inputs]."""
        return linear(input, self.weight.to(input.dtype), self.bias.to(input.dtype))


class Layer(nn.Module):
    """A block: a linear map and a non-linearity that can be differentiated twice."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.linear = Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Transform `x` [B, inputs]."""
        return torch.tanh(self.linear(x))


class TwoNetworks(LightningModule):
    """Non-saturating logistic GAN loss with R1 (Mescheder et al. 2018, arXiv 1801.04406).

    Args:
        optimizer: `lr` of both; `gradient_clip` by part is the trainer's.
        r1: Weight gamma / 2 of the penalty.
        ema_decay: Per step.
        seed: Of the initial values.
    """

    double_backward = ("discriminator",)

    def __init__(self, *, optimizer: dict[str, Any], r1: float, ema_decay: float, seed: int):
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(seed)
        self.discriminator = nn.Sequential(
            Layer(POINT, WIDTH), Layer(WIDTH, WIDTH), Linear(WIDTH, 1)
        )
        self.generator = nn.Sequential(
            Layer(NOISE, WIDTH), Layer(WIDTH, WIDTH), Linear(WIDTH, POINT)
        )
        self.lr, self.r1, self.ema_decay = optimizer["lr"], r1, ema_decay
        for name, parameter in self.generator.named_parameters():
            self.register_buffer(_ema_name(name), parameter.detach().clone())

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The two networks, in the order of their updates."""
        return {"discriminator": self.discriminator, "generator": self.generator}

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers of both."""
        return [m for m in self.modules() if isinstance(m, Layer)]

    def configure_optimizers(self) -> tuple[list[Optimizer], list[ExponentialLR]]:
        """One optimizer for each part, with a schedule."""
        optimizers: list[Optimizer] = [
            torch.optim.SGD(part.parameters(), lr=self.lr, momentum=0.9, fused=True)
            for part in self.parts.values()
        ]
        return optimizers, [ExponentialLR(optimizer, gamma=0.95) for optimizer in optimizers]

    def training_step(self, batches: list[dict[str, Tensor]], index: int) -> dict[str, Tensor]:
        """Update the discriminator on a step's micro-batches, then the generator."""
        losses = {}
        for name, optimizer in zip(self.parts, self.optimizers(), strict=True):  # type: ignore
            total = 0
            for batch in batches:
                with self.phase(optimizer, is_last=batch is batches[-1]):
                    loss = getattr(self, f"{name}_loss")(**batch) / len(batches)
                    self.manual_backward(loss)
                total = total + loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            losses[name] = total
        for schedule in self.lr_schedulers():  # type: ignore
            schedule.step()
        strategy: Any = self.trainer.strategy
        for name, value in strategy.whole_parameters("generator"):
            self.get_buffer(_ema_name(name)).lerp_(value, 1 - self.ema_decay)
        return {"loss": losses["generator"], "train/discriminator": losses["discriminator"]}

    def phase(self, optimizer: Any, *, is_last: bool) -> AbstractContextManager[None]:
        """Freeze the other part; exchange gradients after the last micro-batch."""
        return optimizer.toggle_model(sync_grad=is_last)

    def discriminator_loss(self, points: Tensor, noise: Tensor) -> Tensor:
        """softplus(D(G(z))) + softplus(-D(x)) + r1 |grad D(x)|^2."""
        with torch.no_grad():
            fakes = self.generator(noise)
        loss = softplus(self.discriminator(fakes)) + softplus(-self.discriminator(points))
        return (loss.squeeze(1) + self.r1 * self.penalty(points)).mean()

    def penalty(self, points: Tensor) -> Tensor:
        """|grad D(x)|^2 [B], computed in fp32 under any autocast."""
        points = points.detach().float().requires_grad_()
        with torch.autocast(points.device.type, enabled=False):
            scores = self.discriminator(points)
            (gradient,) = torch.autograd.grad(scores.sum(), points, create_graph=True)
        return gradient.square().sum(1)

    def generator_loss(self, points: Tensor, noise: Tensor) -> Tensor:
        """softplus(-D(G(z)))."""
        return softplus(-self.discriminator(self.generator(noise))).mean()


class Points(LightningDataModule):
    """Samples that are a function of their number; `batch_samples` of them a step, over all ranks.

    Args:
        plan: Of the run.
    """

    def __init__(self, *, plan: dict[str, int]):
        super().__init__()
        self.plan, self.num_steps = plan, plan["max_samples"] // plan["batch_samples"]

    def train_dataloader(self) -> "Points":
        """The loader is this object."""
        return self

    def __len__(self) -> int:
        return self.num_steps * self.plan["grad_accum"]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield this rank's micro-batches of each step from where the run is."""
        trainer: Any = self.trainer
        batch, share = self.plan["batch_samples"], self.plan["batch_samples"] // trainer.world_size
        for step in range(trainer.global_step, self.num_steps):
            generator = torch.Generator().manual_seed(step)
            points = 1 + torch.randn(batch, POINT, generator=generator)
            noise = torch.randn(batch, NOISE, generator=generator)
            mine = slice(trainer.global_rank * share, (trainer.global_rank + 1) * share)
            for micro in torch.arange(batch)[mine].split(self.plan["micro_batch"]):
                yield {"points": points[micro], "noise": noise[micro]}


def _ema_name(name: str) -> str:
    return "ema_" + name.replace(".", "_")
