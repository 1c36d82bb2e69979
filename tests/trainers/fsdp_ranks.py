"""The program of the ranks of `test_fsdp.py`: cases that all ranks run, one after another."""

import copy
import os
import sys
import traceback
import warnings
from pathlib import Path

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.trainers.fsdp_modules import (
    STEPS,
    Adversaries,
    OnePart,
    TinyGPT,
    batches,
    fit,
    token_batches,
    weights,
)
from trainers.activation_checkpointing import ActivationCheckpointing
from trainers.strategies.fsdp import FullySharded

ADAMW = {"make": torch.optim.AdamW, "lr": 0.01, "weight_decay": 0.1}
FULL = [ActivationCheckpointing("full")]
ONE_PART = {  # arguments of the module, of fit
    "plain": ({}, {}),
    "adamw": (ADAMW, {}),
    "accumulated": ({}, {"accum": 2}),
    "kept_back": ({}, {"accum": 2, "exchange_every_micro_batch": False}),
    "recomputed": ({}, {"callbacks": FULL}),
    "gathered": ({}, {"reshard_after_forward": False}),
    "offloaded": (ADAMW, {"cpu_offload": True}),
    "copies": ({}, {"shard_size": 1, "accum": 2, "gradient_clip": 0.3}),
    "one_copy": ({}, {"shard_size": 2, "callbacks": FULL, "gradient_clip": 0.3}),
    "clipped": (ADAMW, {"gradient_clip": 0.3}),
}


PRESETS = ["gpt2_tiny", "modern_tiny"]


class KeepsOldWeights(FullySharded):
    """The negative control: gathered weights stay over the step."""

    def finish_gradients(self, part):
        pass


def case_one_part(out):
    found = {}
    for name, (built, options) in ONE_PART.items():
        trainer = fit(OnePart(**built), **options)
        norm = trainer.strategy.gradient_norms["network"]
        found[name] = weights(trainer), norm
    return found


def case_start(out):
    module = OnePart(lr=0.0)
    trainer = fit(module, steps=1)
    held = sum(p.to_local().numel() for p in module.parameters())
    torch.manual_seed(int(os.environ["RANK"]))
    ordinary = OnePart(device="cpu", lr=0.0)  # whose values differ between ranks
    drawn = copy.deepcopy(ordinary.state_dict())
    return module.most_alive, held, weights(trainer), drawn, weights(fit(ordinary, steps=1))


def case_adversaries(out):
    found = {}
    for name, strategy, accum, options in [
        ("plain", FullySharded, 1, {}),
        ("accumulated", FullySharded, 2, {}),
        ("kept_back", FullySharded, 2, {"exchange_every_micro_batch": False}),
        ("bf16", FullySharded, 1, {"precision": "bf16"}),
        ("control", KeepsOldWeights, 1, {}),
    ]:
        module = Adversaries(accum)
        found[name] = weights(fit(module, strategy, **options)), module.grad_dtypes
    return found


def case_bf16(out):
    rank = int(os.environ["RANK"])
    return {
        preset: weights(fit(TinyGPT(preset), data=token_batches(rank), precision="bf16"))
        for preset in PRESETS
    }


class SavesHalfWay(lightning.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == STEPS // 2:
            trainer.save_checkpoint(self.path)


def case_checkpoint(out):
    fit(OnePart(**ADAMW), callbacks=[SavesHalfWay(out / "half")]).save_checkpoint(out / "whole")
    fit(OnePart(**ADAMW), resume=out / "half").save_checkpoint(out / "resumed")
    fit(OnePart(**ADAMW), resume=out / "single").save_checkpoint(out / "moved")


class Thawing(OnePart):
    """A block that learns from the third step on."""

    def __init__(self):
        super().__init__(lr=0.02)
        self.network.blocks[0].requires_grad_(False)
        self.grad_dtypes = []

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 2:
            self.network.blocks[0].requires_grad_(True)

    def on_before_optimizer_step(self, optimizer):
        grad = self.network.blocks[0].linear.weight.grad
        self.grad_dtypes.append(None if grad is None else grad.dtype)


def case_thawing(out):
    module = Thawing()
    fit(module, precision="bf16")
    return module.grad_dtypes


def case_again(out):
    """Other Trainers go on with a module that is sharded already, and evaluate it."""
    module, data = OnePart(lr=0.02), batches(rank=int(os.environ["RANK"]))
    for half in (data[: STEPS // 2], data[STEPS // 2 :]):
        trainer = fit(module, data=half, steps=STEPS // 2)

    def validation_step(batch, batch_idx):
        module.log("val", module.network(batch[0]).sum())

    module.validation_step = validation_step
    loader = DataLoader(data[:1], batch_size=None)
    (metrics,) = trainer.validate(module, loader, verbose=False)
    return weights(trainer), metrics["val"]


class Overflowing(OnePart):
    def training_step(self, batch, batch_idx):
        factor = 1e38 if self.trainer.global_rank == 1 else 1.0
        return factor * super().training_step(batch, batch_idx)


def case_overflow(out):
    trainer = fit(Overflowing(), steps=1, precision="fp16")
    return weights(trainer), trainer.strategy.loss_scale_state()


class Unfit(lightning.LightningModule):
    def training_step(self, batch, batch_idx):
        raise AssertionError("it starts")

    def configure_optimizers(self):
        raise AssertionError("it starts")


class Silent(Unfit):
    def __init__(self):
        super().__init__()
        self.network = nn.Linear(3, 1, device="meta")


class Bare(Unfit):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


def case_refusals(out):
    odd, renamed = OnePart(), OnePart()
    odd.shapes["network.leave.bias"] = (7,)
    renamed.network.added = nn.Linear(1, 1)
    renamed.shapes = {name: p.shape for name, p in renamed.named_parameters()}
    found = {}
    for name, module, options in [
        ("shape", odd, {}),
        ("silent", Silent(), {}),
        ("bare", Bare(), {}),
        ("weights", renamed, {"resume": out / "half"}),
    ]:
        try:
            fit(module, **options)
        except ValueError as error:
            found[name] = str(error)
    return found


def run_cases(out):
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", module="lightning")
    for name in [name for name in globals() if name.startswith("case_")]:
        try:
            result = globals()[name](out)
        except Exception:
            result = traceback.format_exc()
        torch.save(result, out / f"{name.removeprefix('case_')}-{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_cases(Path(sys.argv[1]))
