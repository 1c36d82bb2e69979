"""Rounds of a GAN as others write them: Lightning's example of two optimizers, and plain loops.

Legend: B images, C channels, H rows, W columns.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus
from torch.optim import Adam, Optimizer
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from benchmarks.turns import clocks

Networks = tuple[Any, Any]
"""Generator and discriminator."""
RATES: dict[str, Any] = {"lr": 2e-4, "betas": (0.5, 0.999)}
EMA_SHARE = 0.005  # any costs as much


def confused(logits: Tensor, target: float) -> Tensor:
    """Cross-entropy of logits [B] with a target that all share, as a mean."""
    return binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


class Example(LightningModule):
    """The round of Lightning's GAN example, around other networks.

    Manual optimization, each optimizer toggled; the generator first, then the discriminator by two
    passes, on images and on fakes that are made again; plain Adam; both losses logged.

    Args:
        networks: To train.
    """

    def __init__(self, networks: Networks):
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = networks

    def configure_optimizers(self) -> list[Optimizer]:
        """One for each network, as torch makes it where nothing else is said."""
        parts = (self.generator, self.discriminator)
        return [Adam(part.parameters(), **RATES) for part in parts]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Make a round on images [B, C, H, W]."""
        (real,), (of_generator, of_discriminator) = batch, self.optimizers()  # type: ignore[misc]
        noise = torch.randn(len(real), self.generator.noise_size, device=real.device)
        self.discriminator.refresh()

        self.toggle_optimizer(of_generator)
        generator_loss = confused(self.discriminator(self.generator(noise)), 1)
        of_generator.zero_grad()
        self.manual_backward(generator_loss)
        of_generator.step()
        self.untoggle_optimizer(of_generator)

        self.toggle_optimizer(of_discriminator)
        real_loss = confused(self.discriminator(real), 1)
        fake_loss = confused(self.discriminator(self.generator(noise).detach()), 0)
        discriminator_loss = (real_loss + fake_loss) / 2
        of_discriminator.zero_grad()
        self.manual_backward(discriminator_loss)
        of_discriminator.step()
        self.untoggle_optimizer(of_discriminator)
        self.log_dict({"d_loss": discriminator_loss, "g_loss": generator_loss})


class Stopwatch(Callback):
    """Reads the clocks after the first round and after the last."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """As the class says."""
        if batch_idx == 0:
            self.begun = clocks()
        if batch_idx + 1 == trainer.num_training_batches:
            self.seconds = clocks() - self.begun


class ExampleSide:
    """The example under Lightning's `Trainer`, which begins again with each turn.

    Its first round and all before it are not timed. Images lie in memory as what the networks take,
    so that no worker could help; there is no logger, progress bar or checkpoint.

    Args:
        networks: To train.
        images: fp32 [images, C, H, W].
        batch: B.
        accelerator: `cpu` or `cuda`.
        precision: `fp32` or `bf16`.
    """

    def __init__(
        self, networks: Networks, images: Tensor, *, batch: int, accelerator: str, precision: str
    ):
        self.module, self.data, self.batch = Example(networks), TensorDataset(images), batch
        self.options: dict[str, Any] = {
            "accelerator": accelerator,
            "precision": {"fp32": "32-true", "bf16": "bf16-mixed"}[precision],
        }

    def turn(self, num_rounds: int) -> Tensor:
        """Train; give what `clocks` does."""
        sampler = RandomSampler(self.data, num_samples=(num_rounds + 1) * self.batch)
        trainer = Trainer(
            **self.options,
            devices=1,
            max_epochs=1,
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            callbacks=[stopwatch := Stopwatch()],
        )
        trainer.fit(self.module, DataLoader(self.data, batch_size=self.batch, sampler=sampler))
        return stopwatch.seconds


class PlainSide:
    """A loop in plain torch, without Lightning, loader and logging.

    Args:
        networks: To train.
        images: fp32 [images, C, H, W].
        batch: B.
        accelerator: `cpu` or `cuda`.
        precision: `fp32` or `bf16`.
        fused: Whether Adam is.
    """

    def __init__(
        self,
        networks: Networks,
        images: Tensor,
        *,
        batch: int,
        accelerator: str,
        precision: str,
        fused: bool = False,
    ):
        self.generator, self.discriminator = (network.to(accelerator) for network in networks)
        self.images, self.batch, self.is_low = images, batch, precision == "bf16"
        self.device = torch.device(accelerator)
        self.of_generator, self.of_discriminator = (
            Adam(network.parameters(), **RATES, fused=fused or None) for network in networks
        )

    def turn(self, num_rounds: int) -> Tensor:
        """Train; give what `clocks` does."""
        begun = clocks()
        for _ in range(num_rounds):
            chosen = torch.randint(len(self.images), (self.batch,))
            real = self.images[chosen].to(self.device)
            noise = torch.randn(self.batch, self.generator.noise_size, device=self.device)
            self.discriminator.refresh()
            self.round(real, noise)
        return clocks() - begun

    def round(self, real: Tensor, noise: Tensor) -> None:
        """The example's: the generator first, everything apart, fakes made twice."""
        self.discriminator.requires_grad_(False)
        with self.precision():
            loss = confused(self.discriminator(self.generator(noise)), 1)
        self.update(self.of_generator, loss)
        self.discriminator.requires_grad_(True)
        with torch.no_grad(), self.precision():
            fakes = self.generator(noise)
        with self.precision():
            real_loss = confused(self.discriminator(real), 1)
            loss = (real_loss + confused(self.discriminator(fakes), 0)) / 2
        self.update(self.of_discriminator, loss)

    def precision(self) -> AbstractContextManager[Any]:
        """What forward passes run under."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_low)

    def update(self, optimizer: Optimizer, loss: Tensor) -> None:
        """Step by the gradient of a loss."""
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class OurRoundSide(PlainSide):
    """Trainyard's round in plain torch: what is left of its run without Trainyard.

    Fakes are made once, the discriminator sees both kinds in one pass and goes first, Adam is
    fused, and an average follows the generator.
    """

    def __init__(self, networks: Networks, *arguments: Any, **options: Any):
        super().__init__(networks, *arguments, **options, fused=True)
        self.average = [p.detach().clone() for p in self.generator.parameters()]

    def round(self, real: Tensor, noise: Tensor) -> None:
        """As the class says."""
        with self.precision():
            fakes = self.generator(noise)
            logits = self.discriminator(torch.cat([real, fakes.detach()])).float()
        real_logits, fake_logits = logits.chunk(2)
        loss = (softplus(-real_logits) + softplus(fake_logits)).mean()
        self.update(self.of_discriminator, loss)
        self.discriminator.requires_grad_(False)
        with self.precision():
            loss = softplus(-self.discriminator(fakes).float()).mean()
        self.update(self.of_generator, loss)
        self.discriminator.requires_grad_(True)
        with torch.no_grad():
            for mine, weight in zip(self.average, self.generator.parameters(), strict=True):
                mine.lerp_(weight, EMA_SHARE)
