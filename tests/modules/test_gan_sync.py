"""Batch norm over the images of all ranks."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate

from benchmarks.cells import start_ranks
from launch.completion import complete
from launch.run_directory import RunDirectory
from modules.gan_norms import BatchNorm
from tests.modules.gan_sync_ranks import CLASSES, LABELS, SIZES, differentiate, layer_of, made_up
from trainers.checkpoint import load_weights
from trainers.metrics import read_metrics


@pytest.fixture
def run_settings(gan_run):
    return [
        *gan_run,
        "module.network.norm=batch",
        "module.optimizer={name: sgd, lr: 0.02, sgd: {momentum: 0.5}}",
        "max_steps=4",
        "batch_images=8",
        "trainer.val_every_steps=100",
    ]


@pytest.fixture
def trained(run_settings, compose, train, tmp_path):
    """Folder of what two ranks did, with the run `alone` of one."""
    for name, batch_norm in {"together": "synced", "apart": "per_rank"}.items():
        ranks = ["strategy=ddp", "trainer.devices=2", f"run.name={name}"]
        ranks.append(f"module.batch_norm={batch_norm}")
        config = compose("train", [*run_settings, *ranks])
        complete(config, 2)
        run = RunDirectory(tmp_path / "runs" / name)
        run.path.mkdir(parents=True)
        run.accept(config)
    train(*run_settings, "run.name=alone")
    start_ranks("tests.modules.gan_sync_ranks", [str(tmp_path), "cpu"], 2)
    return tmp_path


def by_hand(x, layer, labels, epsilon=1e-3):
    """Whole-batch normalisation by torch."""
    plain = F.batch_norm(x, None, None, training=True, eps=epsilon)
    shape = (-1, 3, *(1 for _ in x.shape[2:]))
    gain, bias = (p if labels is None else p[labels] for p in (layer.weight, layer.bias))
    return plain * gain.view(shape) + bias.view(shape)


def largest_difference(folder, name):
    runs: list[Any] = [RunDirectory(folder / "runs" / each) for each in ("alone", name)]
    one, other = (load_weights(run.find_checkpoint("last")) for run in runs)
    assert one.keys() == other.keys()
    assert any("running_var" in key for key in one)
    weights = max(float((one[key].double() - other[key].double()).abs().max()) for key in one)
    key, losses = "train/generator_loss", []
    for run in runs:
        rows = read_metrics(run.path / "metrics.jsonl")
        losses.append(torch.tensor([row[key] for row in rows if key in row]))
    assert len(losses[0]) == 4
    return max(weights, float((losses[0] - losses[1]).abs().max()))


def check_layers(folder):
    """Compare what two ranks gave with the whole batch on one."""
    ranks = [torch.load(folder / f"{rank}.pt", map_location="cpu") for rank in (0, 1)]
    for (name, size), num_classes in ((s, c) for s in SIZES.items() for c in CLASSES):
        x, labels = made_up(*size), None if num_classes is None else LABELS
        layer = layer_of(num_classes)
        expected = differentiate(layer, x, labels)
        torch.testing.assert_close(expected["out"], by_hand(x, layer, labels))
        for is_synced in (True, False):
            halves = [rank[name, num_classes, is_synced] for rank in ranks]
            found = {
                key: torch.cat([half[key] for half in halves]) for key in ("out", "x", "second x")
            }
            for key in ("weight", "bias", "second weight"):
                found[key] = halves[0][key] + halves[1][key]
            found |= {key: halves[1][key] for key in ("mean", "variance")}
            for key, value in found.items():
                is_equal = torch.allclose(value, expected[key], rtol=1e-6, atol=1e-6)
                assert is_equal == is_synced, (name, num_classes, key, is_synced)


def test_ranks_together_are_one_batch(trained):
    check_layers(trained)
    assert largest_difference(trained, "together") < 1e-5
    assert largest_difference(trained, "apart") > 1e-3


@pytest.mark.gpu
def test_ranks_together_are_one_batch_on_cuda(tmp_path):
    start_ranks("tests.modules.gan_sync_ranks", [str(tmp_path), "cuda"], 2)
    check_layers(tmp_path)


@pytest.mark.parametrize(
    ("world_size", "batch_norm", "is_synced"),
    [(2, "synced", True), (2, "per_rank", False), (1, "synced", False)],
)
@pytest.mark.parametrize("preset", ["dcgan_tiny", "sngan_tiny"])
def test_statistics_are_of_all_ranks_where_asked(
    run_settings, compose, preset, world_size, batch_norm, is_synced
):
    other = [f"module.preset={preset}", "module.network.dropout=null", "datamodule.resolution=32"]
    config = compose("train", [*run_settings, *other, f"module.batch_norm={batch_norm}"])
    complete(config, 1)
    module = instantiate(config.module, _convert_="all")
    module._trainer = SimpleNamespace(world_size=world_size)
    module.configure_model()
    norms = [layer for layer in module.generator.modules() if isinstance(layer, BatchNorm)]
    assert norms
    assert {layer.is_synced for layer in norms} == {is_synced}
