"""A run equals a training loop written out by hand in plain torch, step by step."""

import math

import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy

from launch.completion import complete
from trainers.metrics import read_metrics

STEPS, BATCH, WARMUP_STEPS = 40, 8, 4
OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.99), fused=False),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.3, momentum=0.9),
}


@pytest.fixture
def overrides(small_run):
    """A run long and steep enough that a wrong step shows in the losses."""
    return [
        *small_run,
        "module.network.dropout=0",
        "module.optimizer.gradient_clip=0.5",
        f"max_steps={STEPS}",
        f"batch_samples={BATCH}",
        f"module.schedule.warmup_samples={WARMUP_STEPS * BATCH}",
        "trainer.val_every_steps=100",
        "checkpoints.every_steps=null",
    ]


@pytest.fixture
def completed(compose):
    """The configuration as the launcher completes it."""

    def compose_and_complete(overrides):
        config = compose("train", overrides)
        complete(config, 1)
        return config

    return compose_and_complete


def with_optimizer(name):
    rate = OPTIMIZERS[name]([torch.zeros(1)]).param_groups[0]["lr"]
    return [f"module.optimizer.name={name}", f"module.optimizer.lr={rate}"]


def cosine_after_warmup(step):
    """Rate over its peak for step 0, 1, ...: a quarter more each step, then down to a tenth."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    x = (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * x)) / 2


def train_by_hand(config, batches, rate=cosine_after_warmup):
    """Give the loss of every step and the trained network."""
    module = instantiate(config.module, _convert_="all")
    module.configure_model()
    network = module.network
    tables = [p for p in network.parameters() if p.ndim >= 2]
    vectors = [p for p in network.parameters() if p.ndim < 2]
    groups = [
        {"params": tables, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = OPTIMIZERS[config.module.optimizer.name](groups)
    peak, losses = optimizer.param_groups[0]["lr"], []
    for step, (inputs, targets) in enumerate(batches):
        loss = cross_entropy(network(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in tables + vectors))
        for parameter in tables + vectors:
            parameter.grad *= min(1.0, 0.5 / norm)
        for group in optimizer.param_groups:
            group["lr"] = peak * rate(step)
        optimizer.step()
        losses.append(loss.item())
    return losses, network


def read_stream(config):
    """Take the run's batches from a loader of its own."""
    loader = instantiate(config.datamodule, _convert_="all").train_dataloader()
    return [(batch["inputs"], batch["targets"]) for batch in loader]


def logged_losses(run):
    rows = read_metrics(run.path / "metrics.jsonl")
    return [row["train/loss"] for row in rows if "train/loss" in row]


def furthest(one, other):
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_run_equals_plain_loop(name, overrides, train, completed):
    overrides = [*overrides, *with_optimizer(name)]
    config = completed(overrides)
    batches = read_stream(config)
    losses, network = train_by_hand(config, batches)
    run = train(*overrides)
    assert losses[-1] < losses[0] - 0.5
    assert furthest(logged_losses(run), losses) < 1e-5
    saved = load_file(run.find_checkpoint("last") / "weights.safetensors")
    for parameter, value in network.named_parameters():
        torch.testing.assert_close(saved[f"network.{parameter}"], value, rtol=1e-4, atol=1e-5)

    # A wrong order, and a schedule that is one step late, are further away than rounding.
    swapped = [*batches[:10], batches[11], batches[10], *batches[12:]]
    assert furthest(train_by_hand(config, swapped)[0], losses) > 1e-3
    late = train_by_hand(config, batches, rate=lambda step: cosine_after_warmup(max(step - 1, 0)))
    assert furthest(late[0], losses) > 1e-3


def test_accumulated_run_equals_plain_loop_of_whole_batches(overrides, train, completed):
    overrides = [*overrides, *with_optimizer("adamw")]
    whole = completed(overrides)
    losses, _ = train_by_hand(whole, read_stream(whole))
    run = train(*overrides, "micro_batch=2", "run.name=accumulated")
    assert furthest(logged_losses(run), losses) < 1e-5


def test_stream_gives_pieces_of_the_text(overrides, completed, text_file):
    config = completed(overrides)
    tokenizer = Tokenizer.from_file(f"{config.data.path}/tokenizer.json")
    text = text_file.read_text()
    for inputs, targets in read_stream(config):
        for row, following in zip(inputs.tolist(), targets.tolist(), strict=True):
            assert tokenizer.decode([*row, following[-1]]) in text
            assert row[1:] == following[:-1]
