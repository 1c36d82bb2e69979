"""A GAN's run equals rounds written out by hand in plain torch: every loss, phase and penalty."""

import copy

import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file
from torch.nn.functional import relu, softplus

from launch.completion import complete
from modules.gan import Purpose
from modules.keyed_draws import normal, uniform
from trainers.metrics import read_metrics

STEPS, BATCH, RATE, HALF_LIFE = 6, 8, 0.003, 20
DISCRIMINATOR = {
    "non_saturating": lambda r, f: softplus(-r) + softplus(f),
    "saturating": lambda r, f: softplus(-r) + softplus(f),
    "hinge": lambda r, f: relu(1 - r) + relu(1 + f),
    "least_squares": lambda r, f: ((r - 1) ** 2 + f**2) / 2,
    "wasserstein": lambda r, f: f - r,
    "relativistic": lambda r, f: softplus(f - r),
}
GENERATOR = {
    "non_saturating": lambda r, f: softplus(-f),
    "saturating": lambda r, f: -softplus(f),
    "hinge": lambda r, f: -f,
    "least_squares": lambda r, f: (f - 1) ** 2 / 2,
    "wasserstein": lambda r, f: -f,
    "relativistic": lambda r, f: softplus(r - f),
}


@pytest.fixture
def overrides(gan_run):
    return [
        *gan_run,
        f"max_steps={STEPS}",
        f"batch_images={BATCH}",
        "module.optimizer.name=sgd",
        f"module.optimizer.lr={RATE}",
        "module.optimizer.sgd.momentum=0.9",
        f"module.ema={{half_life_images: {HALF_LIFE}, ramp_up: null}}",
        "trainer.val_every_steps=100",
    ]


@pytest.fixture
def completed(compose):
    def compose_and_complete(overrides):
        config = compose("train", overrides)
        complete(config, 1)
        return config

    return compose_and_complete


def train_by_hand(config, *, freezes=True):
    """Give the losses of every phase, the two networks, and the average."""
    module = instantiate(config.module, _convert_="all")
    generator, discriminator = module.generator, module.discriminator
    name, penalty, lr = config.module.loss.name, config.module.penalty, config.module.optimizer.lr
    rate = lr * (penalty.every_steps / (penalty.every_steps + 1) if penalty.every_steps > 1 else 1)
    of_g = torch.optim.SGD(generator.parameters(), lr=lr, momentum=0.9)
    of_d = torch.optim.SGD(discriminator.parameters(), lr=rate, momentum=0.9)
    average = copy.deepcopy(generator)
    loader = instantiate(config.datamodule, _convert_="all").train_dataloader()
    losses = []
    for step, batch in enumerate(loader):
        x, keys = batch["images"].double().div(127.5).sub(1).float(), batch["keys"]
        y = batch["labels"] if config.module.conditional else None

        def make(purpose, keys=keys, y=y):
            return generator(normal(keys, purpose, generator.noise_size), y)

        def penalties(x, fake, keys=keys, y=y):
            x, fake = x.clone().requires_grad_(), fake.clone().requires_grad_()
            total = torch.zeros(len(x))
            for weight, images in ((penalty.r1, x), (penalty.r2, fake)):
                if weight:
                    (slope,) = torch.autograd.grad(
                        discriminator(images, y).sum(), images, create_graph=True
                    )
                    total = total + weight / 2 * slope.flatten(1).norm(dim=1) ** 2
            if penalty.gradient:
                share = uniform(keys, Purpose.INTERPOLATION, 1, 1, 1)
                mixed = (share * x + (1 - share) * fake).detach().requires_grad_()
                (slope,) = torch.autograd.grad(
                    discriminator(mixed, y).sum(), mixed, create_graph=True
                )
                total = total + penalty.gradient * (slope.flatten(1).norm(dim=1) - 1) ** 2
            return total

        if hasattr(discriminator, "refresh"):
            discriminator.refresh()
        fake = make(Purpose.NOISE).detach()
        d_loss = DISCRIMINATOR[name](discriminator(x, y), discriminator(fake, y)).mean()
        losses.append(float(d_loss.detach()))
        if penalty.every_steps == 1:
            d_loss = d_loss + penalties(x, fake).mean()
        of_d.zero_grad()
        d_loss.backward()
        of_d.step()
        if penalty.every_steps > 1 and step % penalty.every_steps == 0:
            of_d.zero_grad()
            # Biases have a gradient of 0, and so go on by their momentum.
            nothing = 0 * discriminator(x, y).sum()
            (penalty.every_steps * penalties(x, fake).mean() + nothing).backward()
            of_d.step()
        if (step + 1) % config.module.loss.generator_every == 0:
            one_noise = config.module.loss.one_noise
            fake = make(Purpose.NOISE if one_noise else Purpose.FRESH_NOISE)
            if freezes:
                of_d.zero_grad()
            g_loss = GENERATOR[name](discriminator(x, y).detach(), discriminator(fake, y)).mean()
            losses.append(float(g_loss.detach()))
            of_g.zero_grad()
            g_loss.backward()
            of_g.step()
            if not freezes:  # what the generator's loss left in it is stepped on, too
                of_d.step()
        keep = 0.5 ** (BATCH / HALF_LIFE)
        for mine, theirs in zip(average.parameters(), generator.parameters(), strict=True):
            mine.data.mul_(keep).add_(theirs.data, alpha=1 - keep)
    return losses, {"generator": generator, "discriminator": discriminator, "ema.network": average}


def furthest(run, trained):
    """Largest difference of the run's last weights to those of a loop by hand."""
    saved = load_file(run.find_checkpoint("last") / "weights.safetensors")
    return max(
        float((saved[f"{part}.{name}"] - value.detach()).abs().max())
        for part, network in trained.items()
        for name, value in network.named_parameters()
    )


def logged_losses(run):
    rows = read_metrics(run.path / "metrics.jsonl")
    keys = ("train/discriminator_loss", "train/generator_loss")
    return [row[key] for row in rows for key in keys if key in row]


R1 = "module.penalty.r1=2"
CASES = {
    "non_saturating": [],
    "fresh noise": ["module.loss.one_noise=false"],
    "saturating": ["module.loss.name=saturating", R1, "module.penalty.every_steps=2"],
    "hinge": ["module.loss.name=hinge", "module.conditional=true"],
    "spectral norm": [
        "module.loss.name=hinge",
        "module.preset=sngan_tiny",
        "datamodule.resolution=32",
        "module.network.dropout=null",
        f"module.optimizer.lr={RATE / 100}",  # its logits are sums over pixels
    ],
    "least_squares": ["module.loss.name=least_squares", "module.penalty={r1: 1, r2: 2}"],
    "wasserstein": [
        "module.loss={name: wasserstein, generator_every: 3}",
        "module.penalty.gradient=10",
    ],
    "relativistic": [
        "module.loss={name: relativistic, one_noise: false}",
        "module.penalty={r1: 1, r2: 1}",
    ],
    "lazy": ["module.loss.name=relativistic", "module.penalty={r1: 1, r2: 1, every_steps: 3}"],
}

ACCUMULATED = ("non_saturating", "spectral norm", "wasserstein", "lazy")


@pytest.mark.parametrize("name", CASES)
def test_run_equals_rounds_by_hand(name, overrides, train, completed):
    overrides = [*overrides, *CASES[name]]
    losses, trained = train_by_hand(completed(overrides))
    run = train(*overrides)
    assert logged_losses(run) == pytest.approx(losses, rel=1e-6, abs=1e-6)
    assert furthest(run, trained) < 1e-6
    if name in ACCUMULATED:
        accumulated = train(*overrides, "run.name=accumulated", "micro_batch=2")
        assert logged_losses(accumulated) == pytest.approx(losses, rel=1e-6, abs=1e-6)
        assert furthest(accumulated, trained) < 1e-6


def test_without_the_freeze_it_would_be_another_run(overrides, train, completed):
    _, trained = train_by_hand(completed(overrides), freezes=False)
    assert furthest(train(*overrides), trained) > 1e-3


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ("module.penalty.r1=2.1", "another weight"),
        ("module.penalty.every_steps=3", "penalties at other steps"),
        ("module.ema.half_life_images=21", "another average"),
    ],
)
def test_what_is_compared_shows_small_differences(other, what, overrides, train, completed):
    lazy = [*overrides, R1, "module.penalty.every_steps=2"]
    _, trained = train_by_hand(completed(lazy))
    assert furthest(train(*lazy, other), trained) > 1e-4, what
