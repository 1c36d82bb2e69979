"""The GPT family: a decoder trained to predict the next token.

Legend: B batch, T tokens, V vocabulary, D width, L layers.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import SumMetric

from datamodules.batch import IGNORED, TextBatch
from modules.generation import Tokenizer, generate, merge_settings
from modules.gpt_networks import GPTNetwork, initial_value
from modules.gpt_presets import shape_from
from modules.optim import Schedule, build_optimizer, build_schedule, check_settings


class GPT(LightningModule):
    """Decoder language model.

    Reads the batch keys `inputs`, `targets` and, where rows are packed, `documents` (`TextBatch`).
    Returns `train/loss` from `training_step`; logs `val/loss`, `val/bits_per_byte` and
    `val/perplexity`, and the same under `test/`, once per evaluation and exact: the sum over every
    target on every rank over their number. Losses are in nats per token.

    Args:
        preset: A name of `modules.gpt_presets.PRESETS`.
        network: Overrides of the preset, fields of `GPTShape`; None means as the preset has it.
        vocab_size: V.
        sequence_length: T, tokens predicted in a row.
        optimizer: Arguments of `build_optimizer`, and `gradient_clip`, which the trainer reads.
        schedule: Arguments of `build_schedule`.
        plan: `batch_samples`, `max_samples`, `max_steps` and `tokens_per_sample` of the run.
        bytes_per_token: Of the data, for each split; None where unknown, then bits per byte are
            not logged.
        preview: Arguments of `modules.generation.generate`, and `prompts`, a list of texts.
        seed: Of the initial values and of the previews.

    Raises:
        ValueError: Preset, override, optimizer or schedule are unknown or impossible.
    """

    continues_prompts = True
    """Whether what is generated follows a prompt, or is an answer to it."""

    def __init__(
        self,
        *,
        preset: str,
        network: Mapping[str, Any],
        vocab_size: int,
        sequence_length: int,
        optimizer: Mapping[str, Any],
        schedule: Mapping[str, Any],
        plan: Mapping[str, int],
        bytes_per_token: Mapping[str, float] | None,
        preview: Mapping[str, Any],
        seed: int,
    ):
        super().__init__()
        shape = shape_from(preset, dict(network))
        # Without storage until it is known where: a strategy may give a rank its shards only.
        with torch.device("meta"):
            self.network = GPTNetwork(shape, vocab_size=vocab_size, sequence_length=sequence_length)
        # Taken now: a strategy may leave a rank with shards of other shapes.
        self._sizes = {name: p.shape for name, p in self.network.named_parameters()}
        self.optimizer_settings = check_settings(optimizer)
        self.schedule = Schedule(plan, **schedule)  # here, so that a wrong one fails early
        self.bytes_per_token = bytes_per_token
        self.preview_settings = preview
        self.seed = seed
        # Sums of millions of terms: fp32 would lose the digits that two runs are compared by. By
        # default a metric leaves out nan, and a diverged run would look well. (MeanMetric would do
        # in one, but of torchmetrics 1.9 ignores weights when told to keep nan.)
        self.nats = SumMetric(nan_strategy="disable").set_dtype(torch.float64)
        self.num_targets = SumMetric(nan_strategy="disable").set_dtype(torch.float64)

    def configure_model(self) -> None:
        """Give the network storage and initial values, unless it has them or shards of them."""
        if any(parameter.is_meta for parameter in self.network.parameters()):
            self.network.to_empty(device=torch.get_default_device())
            self.network.initialise(self.seed)

    def initial_value(self, name: str) -> Tensor:
        """Initial value of the parameter that `named_parameters` calls `name`; fp32, on the CPU."""
        name = name.removeprefix("network.")
        return initial_value(self.network.shape, name, self._sizes[name], self.seed)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The networks that have an optimizer each: one."""
        return {"network": self.network}

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers, each a unit to checkpoint, shard or compile."""
        return list(self.network.blocks)

    def parameters_by_role(self) -> dict[str, list[nn.Parameter]]:
        """Sort the parameters by what they are to an optimizer (`ParameterRoles`).

        Matrices of the blocks are `matrix` (what Muon is for). The token table is `embedding`, or
        `head` where it is tied, since its rate must then suit the logits; an output projection of
        its own is `head`; gains, biases and learned positions are `other`. Weight decay
        applies to two or more dimensions only, as in nanoGPT, with GPT-3's 0.1 (Brown et al. 2020,
        arXiv 2005.14165, appendix B).
        """
        tied = self.network.shape.tie_embeddings
        roles = {"matrix": [], "embedding": [], "head": [], "other": []}
        for name, parameter in self.network.named_parameters():
            if name.startswith("blocks.") and parameter.ndim == 2:
                roles["matrix"].append(parameter)
            elif name == "embedding.weight":
                roles["head" if tied else "embedding"].append(parameter)
            elif name == "head.weight":
                roles["head"].append(parameter)
            else:
                roles["other"].append(parameter)
        return roles

    def flops_per_sample(self) -> int:
        """Floating-point operations of forward and backward for one row of T tokens.

        6 N T + 6 L T^2 D: N counts the parameters that multiply (all but tables that are only
        looked up; a tied embedding is the head, and counts), two operations forward and four
        backward each; attention's two products of T x T by D take 12 L T^2 D in full, and the
        causal half is counted. Kaplan et al. 2020, arXiv 2001.08361, section 2.1, and Chowdhery
        et al. 2022, arXiv 2204.02311, appendix B, which counts attention in full.
        """
        shape, length = self.network.shape, self.network.sequence_length
        parameters = sum(size.numel() for size in self._sizes.values())
        if shape.positions == "learned":
            parameters -= self._sizes["position_embedding.weight"].numel()
        if not shape.tie_embeddings:
            parameters -= self._sizes["embedding.weight"].numel()
        return 6 * parameters * length + 6 * shape.num_layers * length**2 * shape.width

    def training_step(self, batch: TextBatch, batch_idx: int) -> dict[str, Any]:
        """Compute the loss of a micro-batch.

        Returns:
            `loss`, the summed loss over all B x T positions, ignored ones among the divisor: so
            averaging micro-batches and ranks weighs every token the same; and `train/loss`, a sum
            and its weight, for the mean over the targets that count, wherever they are. Without
            ignored targets the two are equal.
        """
        targets = batch["targets"]
        total = self._summed_loss(batch)
        return {
            "loss": total / targets.numel(),
            "train/loss": (total.detach(), (targets != IGNORED).sum()),
        }

    def validation_step(self, batch: TextBatch, batch_idx: int) -> None:
        """Add a batch to the sums of the evaluation; a row that only pads adds nothing."""
        self.nats.update(self._summed_loss(batch))
        self.num_targets.update((batch["targets"] != IGNORED).sum())

    def test_step(self, batch: TextBatch, batch_idx: int) -> None:
        """As `validation_step`."""
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log `val/loss`, `val/bits_per_byte` and `val/perplexity`."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log `test/loss`, `test/bits_per_byte` and `test/perplexity`."""
        self._log_evaluation("test")

    def _summed_loss(self, batch: TextBatch) -> Tensor:
        return self.network(
            batch["inputs"], batch["targets"], documents=batch.get("documents"), reduction="sum"
        )

    def _log_evaluation(self, split: Literal["val", "test"]) -> None:
        loss = self.nats.compute() / self.num_targets.compute()  # over all ranks
        self.nats.reset()
        self.num_targets.reset()
        values = {f"{split}/loss": loss, f"{split}/perplexity": loss.exp()}
        if self.bytes_per_token is not None:
            bits = loss / math.log(2) / self.bytes_per_token[split]
            values[f"{split}/bits_per_byte"] = bits
        # Equal on all ranks already; without sync_dist Lightning warns that they may not be.
        self.log_dict(values, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer and its schedule, stepped once per optimizer step."""
        optimizer = build_optimizer(self.parameters_by_role(), **self.optimizer_settings)
        batch_samples = self.schedule.plan["batch_samples"]
        scheduler = build_schedule(optimizer, self.schedule, batch_samples)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def generate(self, prompts: list[list[int]], **settings: Any) -> list[list[list[int]]]:
        """Continue prompts by sampling.

        Args:
            prompts: Token ids of each prompt.
            **settings: `seed`, and of `module.preview` what is to be otherwise; each prompt is
                drawn with the seed plus its index.

        Returns:
            For each prompt its `num_sequences` continuations, without prompt and stop token.

        Raises:
            ValueError: A prompt is empty or a setting is outside its range.
        """
        was_training = self.network.training
        self.network.eval()
        seed = settings.pop("seed")
        own = {key: value for key, value in self.preview_settings.items() if key != "prompts"}
        chosen = merge_settings(own, settings)
        try:
            return [
                generate(self.network, prompt, device=self.device, seed=seed + index, **chosen)
                for index, prompt in enumerate(prompts)
            ]
        finally:
            self.network.train(was_training)

    def preview(self, tokenizer: Tokenizer) -> list[dict[str, str]]:
        """Continue the prompts of `module.preview`, the same draws every time.

        A prompt without tokens starts from the stop token, where a document begins.

        Args:
            tokenizer: Of the data the model is trained on.

        Returns:
            Rows of `prompt` and `text`, `num_sequences` for each prompt.

        Raises:
            ValueError: A prompt has no tokens and there is no stop token to start from.
        """
        texts, stop_token = self.preview_settings["prompts"], self.preview_settings["stop_token"]
        start = [] if stop_token is None else [stop_token]
        prompts = [list(tokenizer.encode(text).ids) or start for text in texts]
        if not all(prompts):
            raise ValueError(
                f"module.preview.prompts={list(texts)} -> one of them has no tokens, and the data "
                "has no end token to start from -> choose texts that the tokenizer knows"
            )
        return [
            {"prompt": text, "text": tokenizer.decode(tokens)}
            for text, sequences in zip(texts, self.generate(prompts, seed=self.seed), strict=True)
            for tokens in sequences
        ]
