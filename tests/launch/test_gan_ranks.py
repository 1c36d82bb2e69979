"""A DCGAN on two ranks: statistics of batches by rank in training, one network in evaluations."""

import gc
import json

import pytest
import torch
from hydra.utils import instantiate
from torch.func import functional_call
from torch.nn.functional import softplus

from launch.completion import complete
from launch.evaluate import evaluate_run
from modules.gan import Purpose
from modules.keyed_draws import normal
from tests.launch.gan_runs import rows, weights

# torch's elastic agent leaves the log files of its ranks to the garbage collector.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
    ),
]
RATE, TOLERANCE = 0.01, 1e-5


@pytest.fixture(autouse=True)
def _collect_now():
    yield
    gc.collect()


@pytest.fixture(scope="module")
def settings(gan_settings, tmp_path_factory):
    return [
        *gan_settings,
        f"runs_dir={tmp_path_factory.mktemp('runs')}",
        "batch_images=8",
        "max_steps=6",
        "datamodule.val_max_samples=9",  # one rank has one more than the other
        "datamodule.eval_images=4",
        "module.network={norm: batch, dropout: 0.0, width_factor: null}",
        "module.batch_norm=per_rank",
        "module.optimizer.name=sgd",
        f"module.optimizer.lr={RATE}",
        "module.scores.extractor.training_images=64",
    ]


@pytest.fixture(scope="module")
def two(settings, train):
    """The run on two ranks."""
    return train(*settings, "run.name=two", "strategy=ddp", "trainer.devices=2")


@pytest.fixture(scope="module")
def by_hand(settings, compose):
    """Rounds by hand in which batch norm sees each of so many shares of the batch alone."""
    config = compose("train", settings)
    complete(config, 1)

    def train_by_hand(num_shares):
        module = instantiate(config.module, _convert_="all")
        generator, discriminator = module.generator, module.discriminator
        optimizers = [
            torch.optim.SGD(each.parameters(), RATE) for each in (discriminator, generator)
        ]
        losses = []
        for batch in instantiate(config.datamodule, _convert_="all").train_dataloader():
            shares = [batch["keys"][rank::num_shares] for rank in range(num_shares)]
            order = torch.cat([torch.arange(8)[rank::num_shares] for rank in range(num_shares)])
            x = batch["images"][order].double().div(127.5).sub(1).float()
            fakes = []
            for rank, keys in enumerate(shares):
                noise = normal(keys, Purpose.NOISE, generator.noise_size)
                if rank == 0:  # whose moving averages are saved
                    fakes.append(generator(noise))
                    continue
                others = {name: value.clone() for name, value in generator.named_buffers()}
                fakes.append(functional_call(generator, others, noise))
            fake = torch.cat(fakes)
            real_logits, fake_logits = discriminator(x), discriminator(fake.detach())
            d_loss = (softplus(-real_logits) + softplus(fake_logits)).mean()
            optimizers[0].zero_grad()
            d_loss.backward()
            optimizers[0].step()
            g_loss = softplus(-discriminator(fake)).mean()
            optimizers[1].zero_grad()
            g_loss.backward()
            optimizers[1].step()
            losses += [float(d_loss.detach()), float(g_loss.detach())]
        state = {f"generator.{name}": value for name, value in generator.state_dict().items()}
        return losses, state

    return train_by_hand


def furthest(run, expected):
    saved = weights(run)
    return max(float((saved[name] - value).abs().max()) for name, value in expected.items())


def logged(run):
    keys = ("train/discriminator_loss", "train/generator_loss")
    return [row[key] for row in rows(run) for key in keys if key in row]


def test_each_rank_normalises_by_its_own_share(two, by_hand):
    losses, expected = by_hand(2)
    assert logged(two) == pytest.approx(losses, abs=TOLERANCE)
    assert furthest(two, expected) < TOLERANCE


def test_statistics_of_the_whole_batch_would_train_another(two, by_hand):
    losses, expected = by_hand(1)
    assert furthest(two, expected) > 100 * TOLERANCE
    assert logged(two) != pytest.approx(losses, abs=10 * TOLERANCE)


def test_ranks_score_one_network_with_every_image_once(two, compose):
    signature = two.summary["signatures"]["frechet_distance"]
    assert "real:9|generated:9" in signature
    evaluate_run(compose("evaluate", [f"run={two.path}", "accelerator=cpu", "checkpoint=last"]))
    found = json.loads((two.path / "evaluations/val-step-00000006.json").read_text())
    for name in ("val/frechet_distance", "val/kernel_distance"):
        assert found[name] == pytest.approx(two.summary[name], rel=5e-7)
    assert found["signatures"]["frechet_distance"] == signature
