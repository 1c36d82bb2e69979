"""The GAN family: a generator and a discriminator that train against each other.

Legend: B images of a micro-batch, C channels, H rows, W columns, Z numbers of noise.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from datamodules.batch import KeyedImageBatch
from modules.gan_augmentation import Augmentation
from modules.gan_average import MovingAverage, Purpose, to_floats
from modules.gan_evaluation import EvaluatedGAN
from modules.gan_networks import build_networks, choose_classes, refuse_lone_images
from modules.gan_norms import SYNCED, check_batch_norm, sync_statistics
from modules.gan_objective import Judged, Objective, judge_penalised
from modules.gan_optimization import Rates
from modules.gan_pictures import check_pictures
from modules.gan_scores import ImageScores
from modules.keyed_draws import normal


class GAN(EvaluatedGAN):
    """Generative adversarial network (Goodfellow et al. 2014, arXiv 1406.2661).

    Reads `KeyedImageBatch`. A training step is a round: an update of the discriminator, where
    penalties are lazy and due one more of it, and where due one of the generator; then the moving
    average of the generator. Returns `train/discriminator_loss`, `train/generator_loss`,
    `train/penalty`, `train/real_score`, `train/fake_score` (mean logits), `train/real_sign`, by
    which adaptive augmentation goes, and its probability, `train/augmentation`. Logs under `val/`
    or `test/` scores of as many images of the average as there are real ones
    (`modules.gan_evaluation`). Everything that changes while a run trains is a function of the
    number of images that the discriminator has seen.

    Args:
        preset: A name of `modules.gan_presets.PRESETS`.
        network: Overrides of the preset, fields of its shape; None means as the preset has it.
        resolution: H and W.
        channels: C.
        num_classes: Of the data's labels; None where it has none.
        conditional: Whether to train on the labels.
        loss: `name`, `generator_every` and `one_noise` of `modules.gan_objective.Objective`.
        penalty: `r1`, `r2`, `gradient` and `every_steps` of it.
        augmentation: Arguments of `modules.gan_augmentation.Augmentation`.
        ema: `half_life_images` and `ramp_up` of the moving average.
        optimizer: Arguments of `modules.gan_optimization.Rates`, and `gradient_clip`, which the
            trainer reads.
        batch_norm: `synced` (over ranks) or `per_rank`.
        scores: Arguments of `modules.gan_scores.ImageScores`.
        pictures: Settings of `modules.gan_pictures.drawings`.
        monitor: The metric that decides which checkpoint is best, for the trainer.
        plan: `batch_samples`, `max_samples` and `micro_batch` of the run; a sample is an image.
        seed: Of the initial values and of all that is drawn for evaluations.

    Raises:
        ValueError: A setting is unknown or impossible.
    """

    def __init__(
        self,
        *,
        preset: str,
        network: Mapping[str, Any],
        resolution: int,
        channels: int,
        num_classes: int | None,
        conditional: bool,
        loss: Mapping[str, Any],
        penalty: Mapping[str, Any],
        augmentation: Mapping[str, Any],
        ema: Mapping[str, Any],
        optimizer: Mapping[str, Any],
        batch_norm: str,
        scores: Mapping[str, Any],
        pictures: Mapping[str, Any],
        monitor: str,
        plan: Mapping[str, Any],
        seed: int,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.num_classes = choose_classes(num_classes, conditional=conditional)
        check_batch_norm(batch_norm)
        self.batch_images, max_images = plan["batch_samples"], plan["max_samples"]
        self.generator, self.discriminator = build_networks(
            preset,
            network,
            resolution=resolution,
            channels=channels,
            num_classes=self.num_classes,
            seed=seed,
        )
        refuse_lone_images(self.generator, plan["micro_batch"])
        self.ema = MovingAverage(
            self.generator,
            **ema,
            batch_images=self.batch_images,
            max_images=max_images,
            num_classes=self.num_classes,
            seed=seed,
        )
        self.augmentation = Augmentation(**augmentation, max_images=max_images, channels=channels)
        self.objective = Objective(loss, penalty, max_images=max_images)
        settings = {key: value for key, value in optimizer.items() if key != "gradient_clip"}
        self.rates = Rates(**settings, lazy_steps=self.objective.lazy_steps, max_images=max_images)
        self.scores = ImageScores(**scores)
        self.scores.check_monitor(monitor)
        check_pictures(pictures)
        self.picture_settings, self.batch_norm, self.seed = dict(pictures), batch_norm, seed
        self._report: dict[str, tuple[Tensor, int]] = {}

    # -- what strategies ask for ----------------------------------------------------------------

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The two networks, in the order of their updates."""
        return {"discriminator": self.discriminator, "generator": self.generator}

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers of both, each a unit to checkpoint or shard."""
        return [*self.discriminator.blocks, *self.generator.blocks]

    @property
    def double_backward(self) -> tuple[str, ...]:
        """The discriminator, where its gradient is penalised."""
        return ("discriminator",) if self.objective.penalises else ()

    def configure_model(self) -> None:
        """Let batch norm see the images of all ranks, where that is asked for."""
        is_synced = self.batch_norm == SYNCED and self.trainer.world_size > 1
        for part in self.parts.values():
            sync_statistics(part, is_synced)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """One optimizer for each part; rates are set before each round."""
        return [self.rates.build(name, part.parameters()) for name, part in self.parts.items()]

    # -- training -------------------------------------------------------------------------------

    def training_step(self, batches: list[KeyedImageBatch], batch_idx: int) -> dict[str, Any]:
        """Make a round of updates.

        Args:
            batches: A step's micro-batches.
            batch_idx: Unused.

        Returns:
            Sums over images and their number, of what the class says and the round has.
        """
        step, images = self.global_step, self.global_step * self.batch_images
        objective, self._report = self.objective, {}
        optimizers: Any = self.optimizers()
        self.rates.set(dict(zip(self.parts, optimizers, strict=True)), images)
        self.discriminator.refresh()
        trains_generator = (step + 1) % objective.generator_every == 0
        shared = None
        if trains_generator and objective.one_noise and len(batches) == 1:
            shared = self.fakes(batches[0], Purpose.NOISE)  # serves both
        self._update("discriminator", batches, partial(self._discriminator_terms, shared, images))
        if objective.is_lazy and step % objective.every_steps == 0:
            self._update("discriminator", batches, partial(self._penalty_terms, images))
        if trains_generator:
            self._update("generator", batches, partial(self._generator_terms, shared))
        weights = self.trainer.strategy.whole_parameters("generator")  # type: ignore[attr-defined]
        self.ema.follow(images, weights, self.generator.named_buffers())
        self._adjust_augmentation(step + 1, images + self.batch_images)
        return self._report

    def _update(
        self, part: str, batches: list[KeyedImageBatch], terms: Callable[[KeyedImageBatch], Tensor]
    ) -> None:
        """One step of a part by all terms of its phase, [B] for a micro-batch, summed."""
        optimizer = self.optimizers()[list(self.parts).index(part)]  # type: ignore[index]
        for batch in batches:
            with self.phase(optimizer, is_last=batch is batches[-1]):
                self.manual_backward(terms(batch).mean() / len(batches))
        optimizer.step()
        optimizer.zero_grad()

    def phase(self, optimizer: Any, *, is_last: bool) -> AbstractContextManager[None]:
        """Freeze the other part; exchange gradients after the last micro-batch."""
        return optimizer.toggle_model(sync_grad=is_last)

    def fakes(self, batch: KeyedImageBatch, purpose: Purpose) -> Tensor:
        """Images of the generator [B, C, H, W] from noise keyed by the batch's images."""
        noise = normal(batch["keys"], purpose, self.ema.noise_size)
        return self.generator(noise, self._labels(batch))

    def judge(self, images: Tensor, batch: KeyedImageBatch, purpose: Purpose) -> Tensor:
        """Logits of the discriminator for augmented images; fp32 [B]."""
        augmented = self.augmentation(images, batch["keys"], purpose)
        return self.discriminator(augmented, self._labels(batch)).float()

    def _labels(self, batch: KeyedImageBatch) -> Tensor | None:
        return None if self.num_classes is None else batch.get("labels")

    def _discriminator_terms(
        self, shared: Tensor | None, images: int, batch: KeyedImageBatch
    ) -> Tensor:
        penalised = () if self.objective.is_lazy else self.objective.penalised
        real = to_floats(batch["images"])
        fakes = self._detached_fakes(batch) if shared is None else shared.detach()
        with self._full_precision(bool(penalised)):
            real, fake = self._judge_both(real, fakes.float(), batch, penalised)
            terms = self.objective.discriminator(real.logits, fake.logits)
            self._note(discriminator_loss=terms, real_score=real.logits, fake_score=fake.logits)
            margin = self.objective.margin(real.logits, fake.logits)
            self._note(real_sign=margin.sign() + 0 * margin)  # what is no number has the sign 0
            if penalised:
                known = {"r1": real, "r2": fake}
                terms = terms + self._penalty(images, batch, real.images, fakes, known)
        return terms

    def _penalty_terms(self, images: int, batch: KeyedImageBatch) -> Tensor:
        fakes = self._detached_fakes(batch) if self.objective.penalises_fakes else None
        with self._full_precision():
            real = to_floats(batch["images"])
            return self.objective.every_steps * self._penalty(images, batch, real, fakes, {})

    def _generator_terms(self, shared: Tensor | None, batch: KeyedImageBatch) -> Tensor:
        purpose = Purpose.NOISE if self.objective.one_noise else Purpose.FRESH_NOISE
        fake = self.fakes(batch, purpose) if shared is None else shared
        real_logits = None
        if self.objective.pairs:
            with torch.no_grad():
                real_logits = self.judge(to_floats(batch["images"]), batch, Purpose.REAL)
        terms = self.objective.generator(self.judge(fake, batch, Purpose.FRESH_FAKE), real_logits)
        self._note(generator_loss=terms)
        return terms

    def _detached_fakes(self, batch: KeyedImageBatch) -> Tensor:
        with torch.no_grad():
            return self.fakes(batch, Purpose.NOISE)

    def _judge_both(
        self, real: Tensor, fakes: Tensor, batch: KeyedImageBatch, penalised: Sequence[str]
    ) -> tuple[Judged, Judged]:
        """Apart where one is penalised, for the second derivative of both would cost twice."""
        if penalised:
            real, fakes = (
                real.requires_grad_("r1" in penalised),
                fakes.requires_grad_("r2" in penalised),
            )
            kinds = ((real, Purpose.REAL), (fakes, Purpose.FAKE))
            logits = [self.judge(images, batch, purpose) for images, purpose in kinds]
        else:
            shown = self.augmentation(real, batch["keys"], Purpose.REAL)
            shown = torch.cat([shown, self.augmentation(fakes, batch["keys"], Purpose.FAKE)])
            labels = self._labels(batch)
            twice = None if labels is None else labels.repeat(2)
            logits = self.discriminator(shown, twice).float().chunk(2)
        return Judged(real, logits[0]), Judged(fakes, logits[1])

    def _penalty(
        self,
        images: int,
        batch: KeyedImageBatch,
        real: Tensor,
        fakes: Tensor | None,
        known: Mapping[str, Judged],
    ) -> Tensor:
        judged = judge_penalised(
            self.objective.penalised,
            lambda points, purpose: self.judge(points, batch, purpose),
            known=known,
            real=real,
            fakes=fakes,
            keys=batch["keys"],
        )
        penalty = self.objective.penalty(images, judged)
        self._note(penalty=penalty)
        return penalty

    def _full_precision(self, is_asked: bool = True) -> AbstractContextManager[Any]:
        """No autocast where a gradient is penalised: its square is out of reach of fp16."""
        return torch.autocast(self.device.type, enabled=False) if is_asked else nullcontext()

    def _note(self, **values: Tensor) -> None:
        """Add values [B] of a micro-batch to what the step reports."""
        for name, value in values.items():
            total, count = self._report.get(f"train/{name}", (0.0, 0))
            self._report[f"train/{name}"] = (total + value.detach().sum(), count + len(value))

    @torch.no_grad()
    def _adjust_augmentation(self, step: int, images: int) -> None:
        """Tell the augmentation how sure the discriminator is of real images, on all ranks."""
        if self.augmentation.has_target:
            signs, _ = self._report["train/real_sign"]
            signs = self.trainer.strategy.reduce(signs.clone(), reduce_op="sum")
            self.augmentation.observe(signs, self.batch_images)  # type: ignore[arg-type]
        if self.augmentation.is_active:
            self._report["train/augmentation"] = (self.augmentation.probability.clone(), 1)
        self.augmentation.adjust(step, images)
