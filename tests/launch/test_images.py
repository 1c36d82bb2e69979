"""Verbs on image runs, whose module is a stand-in; and exports, of any run."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

from launch.evaluate import load_checkpoint, print_generated
from launch.export import export_run
from launch.generate import generate
from launch.run_directory import RunDirectory
from launch.summary import print_summary, summarize
from tests.launch.image_module import ImageModule
from trainers.callbacks.step_metrics import StepMetrics
from trainers.checkpoint_writer import CheckpointDirectory


@pytest.fixture
def image_run(compose, small_run, tmp_path):
    """A run of `ImageModule` with one checkpoint, at step 3 of 8 images each."""
    config = compose("train", small_run)
    OmegaConf.set_struct(config, False)
    optimizer = {"gradient_clip": None, "name": "adamw"}
    target = f"{ImageModule.__module__}.{ImageModule.__name__}"
    config.module = {"_target_": target, "optimizer": optimizer}
    keys = ("batch_samples", "max_samples", "max_steps", "tokens_per_sample", "micro_batch")
    config.plan = dict.fromkeys(keys, 8)
    run = RunDirectory(tmp_path / "runs" / "images")
    run.checkpoints.mkdir(parents=True)
    OmegaConf.save(config, run.path / "config.yaml")
    torch.manual_seed(0)
    state = {"state_dict": ImageModule(optimizer=optimizer).state_dict(), "global_step": 3}
    CheckpointDirectory({"run": "images"}).save_checkpoint(state, run.checkpoints / "step-00000003")
    (run.checkpoints / "last").write_text("step-00000003\n")
    (run.checkpoints / "best").write_text(json.dumps({"checkpoint": "step-00000003", "value": 1}))
    return run


def overrides(run, *others):
    return [f"run={run.path}", "accelerator=cpu", *others]


def test_generate_writes_images_and_their_grid(image_run, compose, capfd, tmp_path):
    generate(compose("generate", overrides(image_run, "num_images=5", "seed=7")))
    folder = image_run.path / "generated" / "step-00000003-seed=7-num_images=5"
    assert str(folder) in capfd.readouterr().out
    names = [*(f"{number:06d}.png" for number in range(5)), "grid.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    image = Image.open(folder / "000004.png")
    assert (image.mode, image.size) == ("L", (4, 4))
    assert np.asarray(image).max() == np.asarray(image).min() == 107  # not truncated: 1
    assert np.asarray(Image.open(folder / "grid.png")).shape == (4, 20, 3)
    out = tmp_path / "chosen"
    settings = ["num_images=3", "classes=[3,5]", "truncation=0.5", f"out={out}"]
    generate(compose("generate", overrides(image_run, *settings)))
    shades = [np.asarray(Image.open(out / f"{number:06d}.png"))[0, 0] for number in range(3)]
    assert shades == [81, 101, 81]


def test_many_images_are_made_and_written_a_few_at_a_time(image_run, compose, capfd, tmp_path):
    settings = ["num_images=70", "classes=[0,1,2]", f"out={tmp_path / 'many'}"]
    generate(compose("generate", overrides(image_run, *settings)))
    assert "generating" in capfd.readouterr().out
    files = sorted((tmp_path / "many").glob("0*.png"))
    shades = [np.asarray(Image.open(file))[0, 0] for file in files]
    assert shades == [shades[0] + 10 * (number % 3) for number in range(70)]
    assert np.asarray(Image.open(tmp_path / "many" / "grid.png")).shape == (4, 64 * 4, 3)


def test_generate_refuses_what_belongs_to_text(image_run, compose):
    for given in ("prompt=a", "temperature=1", "num_sequences=2", "stop=true"):
        key, _, _ = given.partition("=")
        with pytest.raises(ValueError, match=rf"{key}=\w+ -> ImageModule generates images -> "):
            generate(compose("generate", overrides(image_run, given)))
    for given in ("num_images=0", "num_images=many", "truncation=-1", "truncation=psi"):
        with pytest.raises(ValueError, match=f"{given} -> .* -> choose"):
            generate(compose("generate", overrides(image_run, given)))


def test_export_writes_the_networks_of_an_image_run(image_run, compose, capfd):
    export_run(compose("export", [f"run={image_run.path}"]))
    folder = image_run.path / "exports" / "step-00000003"
    assert str(folder) in capfd.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "ema.safetensors",
        "generator.safetensors",
    ]
    _, module = load_checkpoint(image_run, "last")
    for name, network in module.exports.items():
        loaded = load_file(folder / f"{name}.safetensors")
        assert {*loaded} == {"weight", "bias"}
        assert all(torch.equal(loaded[key], network.state_dict()[key]) for key in loaded)
    facts = json.loads((folder / "config.json").read_text())
    assert (facts["checkpoint"], facts["step"]) == ("step-00000003", 3)
    assert facts["networks"] == ["generator", "ema"]
    assert facts["module"]["_target_"].endswith("ImageModule")
    assert "trainyard" in facts["versions"]


def test_text_run_is_exported_and_refuses_settings_of_images(small_run, train, compose, tmp_path):
    run = train(*small_run, "max_steps=2", "module.schedule.warmup_samples=0")
    out = tmp_path / "exported"
    export_run(compose("export", [f"run={run.path}", f"out={out}"]))
    _, module = load_checkpoint(run, "last")
    loaded = load_file(out / "model.safetensors")
    expected = module.network.state_dict()
    assert {*loaded} == {*expected}
    assert all(torch.equal(loaded[name], expected[name]) for name in loaded)
    facts = json.loads((out / "config.json").read_text())
    assert facts["module"]["vocab_size"] == facts["data"]["vocab_size"]
    for given in ("num_images=4", "truncation=0.5", r"classes=\[1\]", "out=x"):
        with pytest.raises(ValueError, match=f"{given} -> GPT generates text -> "):
            generate(compose("generate", overrides(run, given.replace("\\", ""))))


def summary_of(run, module):
    rows = [{"step": 3, "samples": 24, "images": 24, "train/loss": 1.0, "val/loss": 2.0}]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    others = dict.fromkeys(("guard", "own_work", "slowest"))
    metrics = StepMetrics(
        log_every_steps=1, batch_samples=8, tokens_per_sample=1, unit="images", **others
    )
    metrics.total_samples, metrics.total_seconds = 24, 2.0
    trainer = SimpleNamespace(callbacks=[metrics], lightning_module=module)
    run.write_summary(summarize(run, trainer))
    print_summary(run)
    return run.summary


def test_summary_names_the_grids_of_an_image_run(image_run, capfd, monkeypatch):
    monkeypatch.setattr("trainers.metrics.plot_losses", lambda *args, **options: None)
    grid = image_run.path / "samples" / "images-000000024" / "grid.png"
    grid.parent.mkdir(parents=True)
    grid.write_bytes(b"")
    module = SimpleNamespace(pictures=None, generated=SimpleNamespace(signatures={"fid": "how"}))
    summary = summary_of(image_run, module)
    printed = capfd.readouterr().out
    assert summary["last_grid"] == summary["best_grid"] == str(grid)
    assert "3 steps, 24 images" in printed
    assert "images/s" in printed
    assert printed.count(str(grid)) == 2
    assert "fid is" in printed
    grid.unlink()
    assert "best_grid" not in summary_of(image_run, module)
    assert "pictures" not in summary_of(image_run, SimpleNamespace())


def test_evaluation_without_texts_says_how_it_scored(tmp_path, capfd):
    scores = SimpleNamespace(signatures={"frechet_distance": "features:pixels"}, rows=())
    print_generated(scores, tmp_path / "rows.jsonl")
    assert "features:pixels" in capfd.readouterr().out
    assert not (tmp_path / "rows.jsonl").exists()
