"""A training step of an encoder-decoder here, beside transformers' T5 under its `Trainer`.

    python -m benchmarks.seq2seq_throughput fp32 [--turns 6] [--turn-steps 5] [--threads 2]
    python -m benchmarks.seq2seq_throughput bf16

Both train T5 v1.1's form in one process, in turns, so that both share whatever else the machine
does:

    Trainyard   `EncoderDecoder` under the Lightning trainer that `launch.train` builds, with its
                callbacks, guards and metrics
    Trainer     `T5ForConditionalGeneration` with SDPA attention, fused AdamW, no logging, saving,
                progress bar or check for nan

Shape, number of parameters, batches, optimizer, clipping and threads are the same; there is no
dropout. Either loader gives tensors that lie in memory. The Trainer starts again with each turn:
its first step and all before it are not timed, of ours all is. The table has medians of wall time,
and of processor time, which other processes disturb less.
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import DistributedType
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from lightning import LightningDataModule, LightningModule
from lightning.pytorch import Callback, Trainer
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration, TrainerCallback, TrainingArguments
from transformers import Trainer as PeerTrainer

from benchmarks.turns import clocks, use_threads
from datamodules.batch import IGNORED, PairBatch
from launch import runtime
from trainers.batch_plan import plan_run
from trainers.build import build_trainer
from trainers.strategies.replicated import Single

VOCAB_SIZE, NUM_PAIRS, SOURCE_TOKENS, TARGET_TOKENS = 8192, 16, 128, 64
NUM_BATCHES = 8
SIZES = {
    "encoder_layers": 4, "decoder_layers": 4, "num_heads": 4, "head_width": 64, "width": 256,
    "mlp_width": 512,
}  # fmt: skip
Turns = dict[str, list[Tensor]]
LR, CLIP, BETAS, EPS = 1e-4, 1.0, (0.9, 0.999), 1e-8


def make_batches() -> list[PairBatch]:
    """Draw pairs of random tokens; sources and targets fill from half to all of their length."""
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> tuple[Tensor, Tensor]:
        ends = torch.randint(length // 2, length + 1, (NUM_PAIRS, 1), generator=generator)
        ends[0] = length  # padded to the longest, which it is
        tokens = torch.randint(2, VOCAB_SIZE, (NUM_PAIRS, length), generator=generator)
        return tokens, torch.arange(length) < ends

    batches = []
    for _ in range(NUM_BATCHES):
        (source, mask), (targets, is_target) = draw(SOURCE_TOKENS), draw(TARGET_TOKENS)
        batch = PairBatch(
            source=source * mask,
            source_mask=mask,
            inputs=F.pad(targets[:, :-1] * is_target[:, :-1], (1, 0)),
            targets=targets.masked_fill(~is_target, IGNORED),
            divisor=is_target.sum().float(),
        )
        batches.append(batch)
    return batches


class Batches(LightningDataModule):
    """Gives the same few batches again and again.

    Args:
        batches: To give.
        num_steps: Batches in all.
    """

    def __init__(self, batches: list[PairBatch], num_steps: int):
        super().__init__()
        self.batches, self.num_steps = batches, num_steps

    def train_dataloader(self) -> "Batches":
        """The loader is this object."""
        return self

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[PairBatch]:
        for step in range(self.num_steps):
            yield self.batches[step % len(self.batches)]


class Peer(TrainerCallback):
    """T5 of transformers, trained by its `Trainer` for some steps at a time.

    Args:
        batches: To train on.
        turn_steps: Steps of a turn.
        precision: `fp32` or `bf16`.
        folder: The Trainer's output directory; nothing is written.
    """

    def __init__(self, batches: list[PairBatch], turn_steps: int, precision: str, folder: Path):
        self.turn_steps = turn_steps
        self.begun = self.ended = clocks()
        names = {"input_ids": "source", "attention_mask": "source_mask", "labels": "targets"}
        rows: Any = [
            {theirs: batch[ours].long() for theirs, ours in names.items()} for batch in batches
        ]
        self.model = make_t5()
        arguments: dict[str, Any] = dict(
            output_dir=str(folder), max_steps=turn_steps + 1, optim="adamw_torch_fused",
            per_device_train_batch_size=1,  # a row is a whole batch
            learning_rate=LR, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=CLIP,
            adam_beta1=BETAS[0], adam_beta2=BETAS[1], adam_epsilon=EPS,
            bf16=precision == "bf16", use_cpu=True, logging_strategy="no", save_strategy="no",
            report_to="none", disable_tqdm=True, logging_nan_inf_filter=False,
            dataloader_pin_memory=False, remove_unused_columns=False,
        )  # fmt: skip
        self.trainer = PeerTrainer(
            model=self.model,
            args=TrainingArguments(**arguments),
            train_dataset=rows,
            data_collator=lambda items: items[0],
            callbacks=[self],
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to time after the first step, and end with the last."""
        if state.global_step == 1:
            self.begun = clocks()
        if state.global_step == self.turn_steps + 1:
            self.ended = clocks()

    def turn(self) -> Tensor:
        """Train; give wall and processor seconds of `turn_steps` steps."""
        self.trainer.train()
        # Our process group, did accelerate find it, would put the model into DDP.
        assert self.trainer.accelerator.distributed_type == DistributedType.NO
        assert self.trainer.model_wrapped is self.model
        return self.ended - self.begun


def make_t5() -> Any:
    """Make T5 v1.1 at the shape of `SIZES`, with one table for both sides and a head of its own."""
    settings: dict[str, Any] = dict(
        vocab_size=VOCAB_SIZE, d_model=SIZES["width"], d_kv=SIZES["head_width"],
        d_ff=SIZES["mlp_width"], num_layers=SIZES["encoder_layers"],
        num_decoder_layers=SIZES["decoder_layers"], num_heads=SIZES["num_heads"],
        dropout_rate=0.0, feed_forward_proj="gated-gelu", decoder_start_token_id=0,
        use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    config: Any = T5Config(**settings)
    # Not as an argument, which transformers 5 takes for the head's scale alone, and ties it.
    config.tie_word_embeddings = config.scale_decoder_outputs = False
    torch.manual_seed(0)
    model: Any = T5ForConditionalGeneration(config)
    model.set_input_embeddings(model.shared)  # for both stacks, which an untied head would undo
    return model


class TakeTurns(Callback):
    """Lets the peer run after every turn of our trainer, and times both."""

    def __init__(self, peer: Peer):
        self.peer = peer
        self.taken: Turns = {"Trainyard": [], "Trainer": []}
        self._begun = clocks()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the peer is as large, and start our clock."""
        sides: list[nn.Module] = [pl_module, self.peer.model]
        ours, theirs = (sum(p.numel() for p in side.parameters()) for side in sides)
        assert ours == theirs, (ours, theirs)
        self._begun = clocks()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End a turn of ours where it is over."""
        if (batch_idx + 1) % self.peer.turn_steps == 0:
            self.taken["Trainyard"].append(clocks() - self._begun)
            self.taken["Trainer"].append(self.peer.turn())
            self._begun = clocks()


def configure(precision: str, num_steps: int) -> DictConfig:
    """Compose our run as the command line does; its data are `make_batches`'s."""
    overrides = [
        "module=encoder_decoder",
        "datamodule=pairs",
        "module.preset=small",
        *(f"module.network.{name}={size}" for name, size in SIZES.items()),
        f"module.source_length={SOURCE_TOKENS}",
        f"module.target_length={TARGET_TOKENS}",
        "module.schedule={name: constant, final_lr_fraction: null}",
        f"module.optimizer.lr={LR}",
        f"module.optimizer.gradient_clip={CLIP}",
        f"module.optimizer.adamw.betas=[{BETAS[0]},{BETAS[1]}]",
        f"module.optimizer.adamw.eps={EPS}",
        "module.scores.names=[]",
        "trainer.accelerator=cpu",
        f"trainer.val_every_steps={num_steps}",
        f"precision={precision}",
        f"batch_samples={NUM_PAIRS}",
        f"max_steps={num_steps}",
    ]
    with initialize_config_module("conf", version_base=None):
        config = compose("train", overrides)
    config.data = {"vocab_size": VOCAB_SIZE, "end_token": 1, "start_token": 0}
    config.plan = asdict(plan_run(config, world_size=1))
    return config


def compete(folder: Path, *, precision: str, turns: int, turn_steps: int) -> Turns:
    """Train both sides in turns; give wall and processor seconds of each side's turns."""
    batches, num_steps = make_batches(), turns * turn_steps
    config = configure(precision, num_steps)
    (directory := folder / precision).mkdir()
    sides = TakeTurns(Peer(batches, turn_steps, precision, directory / "peer"))
    trainer = build_trainer(
        runtime.plain(config),
        directory,
        world_size=1,
        resume_step=0,
        grad_accum=1,
        strategy=Single,
        loggers=[],
        callbacks=[sides],
        profiler=None,
    )
    module = instantiate(config.module, _convert_="all")
    trainer.fit(module, Batches(batches, num_steps))
    return sides.taken


def report(taken: Turns, precision: str, turn_steps: int) -> Table:
    """Medians over the turns, without the first, and the ratios turn by turn."""
    table = Table("side", "ms a step", "processor ms a step", "target tokens/s")
    table.title = f"{precision}: {len(taken['Trainer'])} turns of {turn_steps} steps"
    for name, turns in taken.items():
        wall, processor = torch.stack(turns[1:]).quantile(0.5, dim=0).tolist()
        table.add_row(
            name,
            f"{wall / turn_steps * 1e3:.0f}",
            f"{processor / turn_steps * 1e3:.0f}",
            f"{NUM_PAIRS * TARGET_TOKENS * turn_steps / wall:,.0f}",
        )
    ratios = torch.stack(taken["Trainer"][1:]) / torch.stack(taken["Trainyard"][1:])
    for kind, column in zip(("wall", "processor"), ratios.T, strict=True):
        low, median, high = column.quantile(torch.tensor([0, 0.5, 1]).double()).tolist()
        table.caption = (
            f"{table.caption or ''}x Trainer, {kind}: {median:.2f}, {low:.2f} to {high:.2f}\n"
        )
    return table


def main() -> None:
    """Train both sides in one precision and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("precision", choices=("fp32", "bf16"))
    parser.add_argument("--turns", type=int, default=6, help="of each side; the first is not used")
    parser.add_argument("--turn-steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = vars(parser.parse_args())
    use_threads(options.pop("threads"))
    runtime.quiet_libraries()
    with tempfile.TemporaryDirectory() as name:
        taken = compete(Path(name), **options)
    Console().print(report(taken, options["precision"], options["turn_steps"]))


if __name__ == "__main__":
    main()
