"""Modules of one part and of two, their data, and a Trainer for them: for `test_fsdp.py`."""

import copy
import os
import weakref

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader

from modules.gpt import GPT
from trainers.checkpoint_writer import CheckpointDirectory
from trainers.strategies.fsdp import FullySharded
from trainers.strategies.replicated import Single

RANKS, STEPS, ROWS = 2, 6, 4
VOCABULARY, TOKENS = 64, 32
DEFAULTS = {
    "parameters": "low",
    "shard_size": None,
    "reshard_after_forward": True,
    "cpu_offload": False,
    "exchange_every_micro_batch": True,
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x):
        return x + self.linear(x).tanh()


class Network(nn.Module):
    """Rows that do not divide by two, and parameters of one row: shards may be empty."""

    def __init__(self, inputs=3):
        super().__init__()
        self.enter, self.leave = nn.Linear(inputs, 5), nn.Linear(5, 1)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.leave(x)


def draw(name, shape):
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(shape, generator=generator) / 2


class OnePart(lightning.LightningModule):
    def __init__(self, make=torch.optim.SGD, device="meta", **options):
        super().__init__()
        with torch.device(device):
            self.network = Network()
        self.register_buffer("steps", torch.zeros(1))
        self.shapes = {name: p.shape for name, p in self.named_parameters()}
        self.make, self.options = make, options or {"lr": 0.02, "momentum": 0.9}
        self.alive, self.most_alive = [], 0

    @property
    def blocks(self):
        return list(self.network.blocks)

    @property
    def parts(self):
        return {"network": self.network}

    def initial_value(self, name):
        self.alive = [r for r in self.alive if r() is not None]
        self.most_alive = max(self.most_alive, len(self.alive) + 1)
        value = draw(name, self.shapes[name])
        self.alive.append(weakref.ref(value))
        return value

    def configure_model(self):
        if any(parameter.is_meta for parameter in self.parameters()):  # no strategy has filled them
            self.network.to_empty(device="cpu")
            for name, parameter in self.named_parameters():
                parameter.data = self.initial_value(name)

    def training_step(self, batch, batch_idx):
        self.steps += 1
        x, y = batch
        return (self.network(x) - y).square().mean()

    def configure_optimizers(self):
        return self.make(self.parameters(), fused=True, **self.options)


class Adversaries(lightning.LightningModule):
    """Alternating steps, a gradient penalty (R1), and an average of the generator's weights.

    A training step is a round of both parts, which go through `accum` micro-batches of it.
    """

    double_backward = ("discriminator",)

    def __init__(self, accum=1):
        super().__init__()
        self.automatic_optimization = False
        self.accum = accum
        self.generator, self.discriminator = Network(), Network(1)
        for name, parameter in self.named_parameters():
            parameter.data = draw(name, parameter.shape)
        self.average = copy.deepcopy(self.generator).requires_grad_(False)
        self.grad_dtypes = set()

    @property
    def parts(self):
        return {"discriminator": self.discriminator, "generator": self.generator}

    @property
    def blocks(self):
        return [*self.discriminator.blocks, *self.generator.blocks]

    def losses(self, part, x, y):
        if part == "generator":
            return -self.discriminator(self.generator(x)).mean()
        y = y.requires_grad_()
        real = self.discriminator(y)
        (grad,) = torch.autograd.grad(real.sum(), y, create_graph=True)
        fake = self.discriminator(self.generator(x).detach())
        return fake.mean() - real.mean() + real.square().mean() + grad.square().mean()

    def training_step(self, batch, batch_idx):
        cut = [tensor.chunk(self.accum) for tensor in batch]
        micro_batches = list(zip(*cut, strict=True))
        assert len(micro_batches) == self.accum
        for part, optimizer in zip(self.parts, self.optimizers(), strict=True):
            for micro_batch in micro_batches:
                with optimizer.toggle_model(sync_grad=micro_batch is micro_batches[-1]):
                    self.manual_backward(self.losses(part, *micro_batch) / self.accum)
            grads = [p.grad for g in optimizer.param_groups for p in g["params"]]
            self.grad_dtypes |= {g.dtype for g in grads}
            optimizer.step()
            optimizer.zero_grad()
        whole = dict(self.trainer.strategy.whole_parameters("generator"))
        follow(self.average, whole)

    def configure_optimizers(self):
        return [
            torch.optim.SGD(p.parameters(), lr=0.05, momentum=0.5, fused=True)
            for p in self.parts.values()
        ]


class TinyGPT(GPT):
    """A preset at its own size, few tokens, SGD: the rate is large so that differences are too."""

    def __init__(self, preset):
        samples = {"batch_samples": ROWS, "max_samples": ROWS * STEPS}
        super().__init__(
            preset=preset,
            network={},
            vocab_size=VOCABULARY,
            sequence_length=TOKENS,
            optimizer={"name": "sgd", "lr": 0.1, "weight_decay": 0.0, "sgd": {"momentum": 0.9}}
            | {
                "adamw": {"betas": (0.9, 0.95), "eps": 1e-8},
                "muon": {},
                "adamw_rms": {},
                "adafactor": {},
            },
            schedule={"name": "constant", "warmup_samples": 0, "warmup_tokens": None}
            | {"decay_samples": None, "decay_tokens": None, "final_lr_fraction": None},
            plan=samples | {"max_steps": STEPS, "tokens_per_sample": TOKENS},
            bytes_per_token=None,
            preview={},
            seed=1,
        )


def token_batches(rank=None):
    """Rows of a rank, or of all."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(VOCABULARY, (STEPS, ROWS, TOKENS + 1), generator=generator)
    own = rows if rank is None else rows.chunk(RANKS, dim=1)[rank]
    return [{"inputs": row[:, :-1], "targets": row[:, 1:]} for row in own]


@torch.no_grad()
def follow(average, whole):
    for name, parameter in average.named_parameters():
        parameter.lerp_(whole[name].detach(), 0.1)


def batches(steps=STEPS, accum=1, rank=None):
    """Micro-batches of a rank, or of all: the same rows in a step."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(steps):
        x, y = torch.randn(ROWS, 3, generator=generator), torch.randn(ROWS, 1, generator=generator)
        for pair in zip(x.chunk(accum), y.chunk(accum), strict=True):
            own = pair if rank is None else [t.chunk(RANKS)[rank] for t in pair]
            found.append(tuple(own))
    return found


def fit(module, strategy=FullySharded, *, accum=1, steps=STEPS, resume=None, data=None, **options):
    """Train on this rank up to a step, perhaps from a checkpoint at half time."""
    callbacks = options.pop("callbacks", [])
    options = {"precision": "fp32", "device_type": "cpu", "timeout_s": 60} | options
    is_alone = strategy is Single
    rank = None if is_alone else int(os.environ["RANK"])
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1 if is_alone else RANKS,
        strategy=strategy(**(options if is_alone else DEFAULTS | options)),
        max_steps=steps,
        max_epochs=1,
        accumulate_grad_batches=accum,
        plugins=[CheckpointDirectory({})],
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    data = data or batches(STEPS, accum, rank)
    if resume:
        data = data[STEPS // 2 :] + data[: STEPS // 2]
    trainer.fit(module, DataLoader(data, batch_size=None), ckpt_path=resume, weights_only=True)
    return trainer


def weights(trainer):
    """Whole, on the CPU of rank 0; nothing elsewhere."""
    own = trainer.lightning_module.state_dict(keep_vars=True)
    wholes = {name: trainer.strategy.whole(value).cpu().clone() for name, value in own.items()}
    return wholes if trainer.is_global_zero else {}


def put_together(run):
    """A tensor of whose elements each rank has a run."""
    whole = torch.zeros(run.shape.numel())
    whole[run.start : run.stop] = run.values
    torch.distributed.all_reduce(whole)
    return whole.view(run.shape)
