"""What is done with a trained GAN: scored, asked for images, exported, trained further."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from launch.evaluate import evaluate_run
from launch.export import export_run
from launch.generate import generate
from launch.run_directory import RunDirectory
from modules.gan_average import Purpose
from modules.gan_networks import build_networks
from modules.keyed_draws import evaluation_keys, normal
from tests.launch.gan_runs import STATEFUL, rows, weights
from trainers.checkpoint import load_weights


@pytest.fixture(scope="module")
def settings(gan_settings, tmp_path_factory):
    return [
        *gan_settings,
        *STATEFUL,
        f"runs_dir={tmp_path_factory.mktemp('runs')}",
        "batch_images=8",
        "max_steps=8",
        "trainer.val_every_images=32",
        "checkpoints.every_images=32",
        "datamodule.val_max_samples=30",
    ]


@pytest.fixture(scope="module")
def run(settings, train) -> RunDirectory:
    return train(*settings)


def of_run(run, *overrides):
    return [f"run={run.path}", *overrides]


def test_run_leaves_scores_and_pictures_and_says_so_again(run, settings, train, capfd):
    assert [row["images"] for row in rows(run) if "val/frechet_distance" in row] == [32, 64]
    before = {path: path.stat().st_mtime_ns for path in run.checkpoints.rglob("*")}
    assert train(*settings).summary == run.summary
    printed = capfd.readouterr().out
    assert "digits: done" in printed
    assert "8 steps, 64 images" in printed
    assert f"{run.summary['val/frechet_distance']:.4f}" in printed
    assert run.summary["signatures"]["kernel_distance"] in printed
    for name in ("last", "best"):
        grid = run.summary[f"{name}_grid"]
        assert grid in printed
        assert np.asarray(Image.open(grid)).shape == (30 + 2, 2 * 30 + 2, 3)  # two, with gaps
    assert before == {path: path.stat().st_mtime_ns for path in run.checkpoints.rglob("*")}


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_scores_as_the_run_did(split, run, compose, capfd):
    chosen = ["accelerator=cpu", "checkpoint=last", f"split={split}"]
    evaluate_run(compose("evaluate", of_run(run, *chosen)))
    found = json.loads((run.path / f"evaluations/{split}-step-00000008.json").read_text())
    printed = capfd.readouterr().out
    num_images = 30 if split == "val" else run.config.data.images.test
    for name in ("frechet_distance", "kernel_distance"):
        same = pytest.approx(run.summary[f"val/{name}"], rel=5e-7)
        assert (found[f"{split}/{name}"] == same) == (split == "val")
        signature = found["signatures"][name]
        assert f"real:{num_images}|generated:{num_images}" in signature
        assert signature in printed


def images_in(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))])


@pytest.fixture
def imagine(run, compose, tmp_path):
    """Generate images, into a folder of their own; uint8 [n, H, W]."""

    def generate_images(*overrides):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        chosen = ["accelerator=cpu", "checkpoint=last", f"out={out}", *overrides]
        generate(compose("generate", of_run(run, *chosen)))
        return images_in(out)

    return generate_images


def test_generated_image_follows_from_seed_number_and_class(imagine):
    few, many = imagine("num_images=5"), imagine("num_images=70")
    assert few.shape == (5, 28, 28)
    assert np.array_equal(few, imagine("num_images=5", "seed=1"))
    assert np.abs(many[:5].astype(int) - few).max() <= 1  # other kernels for other batch sizes
    assert np.abs(imagine("num_images=5", "seed=2").astype(int) - few).max() > 5
    assert len({image.tobytes() for image in many}) == 70
    of_two = imagine("num_images=5", "classes=[0,3]")  # in turn, as all ten are
    assert [np.array_equal(*pair) for pair in zip(of_two, few, strict=True)] == [
        *(True, False, False, True, False)
    ]
    assert len({image.tobytes() for image in imagine("num_images=4", "truncation=0")}) == 4


@pytest.mark.parametrize(
    "given", ["num_images=0", "num_images=some", "truncation=-1", "classes=[10]", "classes=3"]
)
def test_impossible_images_are_refused(given, imagine):
    with pytest.raises(ValueError, match=f"{re.escape(given)} -> .* -> "):
        imagine(given)


def test_unconditional_run_has_no_classes(settings, train, compose):
    run = train(*settings, "run.name=unconditional", "module.conditional=false", "max_steps=1")
    with pytest.raises(ValueError, match=r"classes=\[1\] -> .* know no classes -> leave it out"):
        generate(compose("generate", of_run(run, "accelerator=cpu", "classes=[1]")))


def test_exported_average_makes_the_same_images_in_plain_torch(run, compose, imagine):
    export_run(compose("export", of_run(run)))
    folder = run.path / "exports" / "step-00000008"
    facts = json.loads((folder / "config.json").read_text())["module"]
    generator, _ = build_networks(
        facts["preset"],
        facts["network"],
        resolution=facts["resolution"],
        channels=facts["channels"],
        num_classes=facts["num_classes"],
        seed=0,
    )
    noise = normal(evaluation_keys(1, torch.arange(20)), Purpose.NOISE, generator.noise_size)
    pictures = {}
    for name in ("ema", "generator"):
        generator.load_state_dict(load_file(folder / f"{name}.safetensors"))
        with torch.no_grad():
            images = generator.eval()(noise, torch.arange(20) % 10)
        pictures[name] = ((images[:, 0] + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    generated = imagine("num_images=20")
    assert np.array_equal(pictures["ema"], generated)
    assert not np.array_equal(pictures["generator"], generated)


def test_another_run_starts_from_its_weights(run, settings, train):
    still = [*settings, "max_steps=1", "module.optimizer.lr=0", "checkpoints.every_images=8"]
    started = weights(train(*still, "run.name=started", f"init_from={run.path}"))
    fresh = weights(train(*still, "run.name=fresh"))
    source = load_weights(run.find_checkpoint("best"))
    for name in ("generator.dense.weight", "discriminator.dense.weight"):
        assert torch.equal(started[name], source[name])
        assert not torch.equal(fresh[name], source[name])
    with pytest.raises(ValueError, match=r"init_from=.* -> its weights do not fit .* -> use the"):
        train(*still, "run.name=other", f"init_from={run.path}", "module.network.noise_size=8")
