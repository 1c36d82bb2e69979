"""The encoder-decoder family: reads a source whole and predicts a target token by token.

Legend: B batch, S source tokens, T target tokens, V vocabulary of targets.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import SumMetric

from datamodules.batch import IGNORED, PairBatch
from modules.decoding import check_generation, decode, pad_sources
from modules.encoder_decoder_kinds import choose_network
from modules.generation import Tokenizer, merge_settings
from modules.optim import Schedule, build_optimizer, build_schedule, check_settings
from modules.scores import Generated
from modules.teacher_forcing import TeacherForcing

_SOURCES_AT_ONCE = 32  # of `generate`


class EncoderDecoder(LightningModule):
    """Sequence-to-sequence model, a Transformer or a recurrent one.

    Reads `PairBatch`. Returns `train/loss` from `training_step`; logs `val/loss`,
    `val/perplexity` and `val/token_accuracy`, exact over every target on every rank, and of
    generated targets `val/bleu`, `val/chrf`, `val/rouge1`, `val/rouge2` and `val/rougeL`
    (`modules.scores`); the same under `test/`. Losses are in nats per token; those of an evaluation
    without label smoothing. Targets are generated where the data has their texts.

    Args:
        preset: A name of `PRESETS` of `modules.encoder_decoder_presets` or of
            `modules.encoder_decoder_recurrent_presets`.
        network: Overrides of the preset, fields of its shape; None means as the preset has it.
        source_vocab: Tokens of the sources' vocabulary.
        target_vocab: V.
        source_length: Tokens of the longest source, with its end token.
        target_length: Tokens of the longest target, with its end token.
        start_token: The decoder's first input.
        stop_token: Ends a target.
        source_end_token: Ends a source.
        label_smoothing: Share of the probability spread over the vocabulary (Szegedy et al. 2016,
            arXiv 1512.00567, section 7).
        teacher_forcing: `start`, `end` and `decay_samples` of `TeacherForcing`.
        optimizer: Arguments of `build_optimizer`, and `gradient_clip`, which the trainer reads.
        schedule: Arguments of `build_schedule`.
        plan: `batch_samples`, `max_samples`, `max_steps` and `tokens_per_sample` of the run.
        pair_tokens: `pairs`, and their tokens `source` and `target`, of the training data.
        generation: `max_new_tokens` (None: `target_length`), `num_beams`, `length_penalty`,
            `temperature`, `top_k` and `top_p` of `modules.decoding.decode`.
        scores: Arguments of `modules.scores.Generated`.
        seed: Of the initial values, of the coins of teacher forcing and of sampling.

    Raises:
        ValueError: A setting is unknown or impossible.
    """

    continues_prompts = False
    """Whether what is generated follows a prompt, or is an answer to it."""

    def __init__(
        self,
        *,
        preset: str,
        network: Mapping[str, Any],
        source_vocab: int,
        target_vocab: int,
        source_length: int,
        target_length: int,
        start_token: int,
        stop_token: int,
        source_end_token: int,
        label_smoothing: float,
        teacher_forcing: Mapping[str, Any],
        optimizer: Mapping[str, Any],
        schedule: Mapping[str, Any],
        plan: Mapping[str, int],
        pair_tokens: Mapping[str, int | None],
        generation: Mapping[str, Any],
        scores: Mapping[str, Any],
        seed: int,
    ):
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(
                f"module.label_smoothing={label_smoothing} -> it is a share -> choose 0 to below 1"
            )
        self._kind = choose_network(preset, network)
        # Without storage until it is known where: a strategy may give a rank its shards only.
        with torch.device("meta"):
            self.network = self._kind.build(
                source_vocab=source_vocab,
                target_vocab=target_vocab,
                source_length=source_length,
                target_length=target_length,
            )
        self._sizes = {name: p.shape for name, p in self.network.named_parameters()}
        self.source_length, self.pair_tokens = source_length, pair_tokens
        self.tokens = {"start_token": start_token, "stop_token": stop_token}
        self.source_end_token = source_end_token
        self.label_smoothing = label_smoothing
        self.teacher_forcing = TeacherForcing(
            **teacher_forcing,
            is_recurrent=self._kind.is_recurrent,
            length=target_length,
            plan=plan,
            seed=seed,
        )
        self.optimizer_settings = check_settings(optimizer)
        self.schedule = Schedule(plan, **schedule)  # here, so that a wrong one fails early
        self.generation, self.seed = dict(generation), seed
        self.generated = Generated(**scores)
        if generation["max_new_tokens"] is None:
            self.generation["max_new_tokens"] = target_length
        check_generation(target_length=target_length, **self.generation)
        self.nats = SumMetric(nan_strategy="disable").set_dtype(torch.float64)  # as `modules.gpt`
        self.num_targets = SumMetric(nan_strategy="disable").set_dtype(torch.float64)
        self.num_correct = SumMetric(nan_strategy="disable").set_dtype(torch.float64)

    def configure_model(self) -> None:
        """Give the network storage and initial values, unless it has them or shards of them."""
        if any(parameter.is_meta for parameter in self.network.parameters()):
            self.network.to_empty(device=torch.get_default_device())
            self.network.initialise(self.seed)

    def initial_value(self, name: str) -> Tensor:
        """Initial value of the parameter that `named_parameters` calls `name`; fp32, on the CPU."""
        name = name.removeprefix("network.")
        return self._kind.initial_value(name, self._sizes[name], self.seed)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The networks that have an optimizer each: one."""
        return {"network": self.network}

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers, each a unit to checkpoint, shard or compile."""
        return list(self.network.blocks)

    def parameters_by_role(self) -> dict[str, list[nn.Parameter]]:
        """Sort the parameters by what they are to an optimizer (`ParameterRoles`)."""
        roles = {"matrix": [], "embedding": [], "head": [], "other": []}
        for name, parameter in self.network.named_parameters():
            roles[self._kind.role_of(name, parameter.ndim)].append(parameter)
        return roles

    def flops_per_sample(self) -> float | None:
        """Operations of a pair of mean length, both ways; None where samples are none or groups."""
        if not (pairs := self.pair_tokens["pairs"]) or self.schedule.plan["tokens_per_sample"] > 1:
            return None
        means = [(self.pair_tokens[side] or 0) / pairs for side in ("source", "target")]
        return self._kind.flops(self._sizes, *means)

    def training_step(self, batch: PairBatch, batch_idx: int) -> dict[str, Any]:
        """Compute the loss of a micro-batch.

        Returns:
            `loss`, the summed loss over the batch's `divisor`, so that averaging micro-batches and
            ranks weighs every target of the step the same; and `train/loss`, a sum and its weight.
        """
        if "divisor" not in batch:
            raise ValueError(
                "module=encoder_decoder -> the datamodule gives no pairs of source and target -> "
                "set datamodule=pairs, or datamodule=denoising"
            )
        targets, samples = batch["targets"], self.global_step * self.schedule.plan["batch_samples"]
        coins = self.teacher_forcing.coins(samples, targets.size(1))
        total = self.network(
            batch["source"],
            batch["source_mask"],
            batch["inputs"],
            targets,
            label_smoothing=self.label_smoothing,
            teacher=None if coins is None else coins.to(self.device),
        )
        count = (targets != IGNORED).sum()
        return {"loss": total / batch["divisor"], "train/loss": (total.detach(), count)}

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Add a batch to the sums of the evaluation, and generate its targets where asked for."""
        logits = self.network(batch["source"], batch["source_mask"], batch["inputs"])  # [B, T, V]
        targets = batch["targets"]
        nats = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        self.nats.update(nats)
        self.num_targets.update((targets != IGNORED).sum())
        self.num_correct.update((logits.argmax(-1) == targets).sum())
        num_before = batch_idx * len(targets) * self.trainer.world_size
        if self.generated.has_room(num_before, batch, is_training=self.trainer.state.fn == "fit"):
            sequences = self._decode(batch["source"], batch["source_mask"], self.seed, {})
            self.generated.add(batch, sequences, self.trainer.datamodule)  # type: ignore

    def test_step(self, batch: PairBatch, batch_idx: int) -> None:
        """As `validation_step`."""
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log losses, accuracy and scores under `val/`."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log losses, accuracy and scores under `test/`."""
        self._log_evaluation("test")

    def _log_evaluation(self, split: Literal["val", "test"]) -> None:
        count = self.num_targets.compute()  # over all ranks
        loss = self.nats.compute() / count
        values = {f"{split}/loss": loss, f"{split}/perplexity": loss.exp()}
        values[f"{split}/token_accuracy"] = self.num_correct.compute() / count
        for metric in (self.nats, self.num_targets, self.num_correct):
            metric.reset()
        scores = self.generated.finish().items()
        # Of torch's default dtype on any device, where others are fp64.
        values |= {f"{split}/{name}": torch.tensor(value) for name, value in scores}
        # Equal on all ranks already; without sync_dist Lightning warns that they may not be.
        self.log_dict(values, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer and its schedule, stepped once per optimizer step."""
        optimizer = build_optimizer(self.parameters_by_role(), **self.optimizer_settings)
        scheduler = build_schedule(optimizer, self.schedule, self.schedule.plan["batch_samples"])
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def generate(self, prompts: list[list[int]], **settings: Any) -> list[list[list[int]]]:
        """Generate targets of sources.

        Args:
            prompts: Token ids of each source; its end token is added.
            **settings: `num_sequences` for each source, `seed`, and of `module.generation` what is
                to be otherwise.

        Returns:
            For each source its targets, without start and stop token.

        Raises:
            ValueError: A source is too long, or a setting is outside its range.
        """
        seed, num_sequences = settings.pop("seed"), settings.pop("num_sequences", 1)
        if num_sequences > 1 and merge_settings(self.generation, settings)["temperature"] == 0:
            raise ValueError(
                f"num_sequences={num_sequences} -> without draws all would be the same -> set "
                "temperature above 0"
            )
        sources = [[*prompt, self.source_end_token] for prompt in prompts]
        longest = max(map(len, sources))
        if longest > self.source_length:
            raise ValueError(
                f"prompt -> its {longest} tokens (with its end) are more than the "
                f"{self.source_length} that the model was made for -> shorten it"
            )
        was_training = self.network.training
        self.network.eval()
        repeated, drawn = [source for source in sources for _ in range(num_sequences)], []
        try:
            for first in range(0, len(repeated), _SOURCES_AT_ONCE):
                part = repeated[first : first + _SOURCES_AT_ONCE]
                source, mask = pad_sources(part, self.source_end_token, self.device)
                drawn += self._decode(source, mask, seed + first, settings)
        finally:
            self.network.train(was_training)
        return [drawn[n : n + num_sequences] for n in range(0, len(drawn), num_sequences)]

    def _decode(
        self, source: Tensor, mask: Tensor, seed: int, settings: Mapping[str, Any]
    ) -> list[list[int]]:
        chosen = merge_settings(self.generation, settings)
        return decode(self.network, source, mask, **self.tokens, seed=seed, **chosen)

    def preview(self, tokenizer: Tokenizer) -> list[dict[str, str]]:
        """Some of what the last validation generated: rows of source, target and prediction."""
        return [
            {"source": source, "target": target, "prediction": prediction}
            for source, target, prediction in self.generated.rows[: self.generated.num_rows]
        ]
