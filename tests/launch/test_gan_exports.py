"""A GAN leaves: what docs/gan.md says of exported networks, and runs on other images."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from launch.evaluate import load_checkpoint
from launch.export import export_run
from modules.gan_pictures import to_bytes
from modules.keyed_draws import evaluation_keys, normal

PAGE = Path(__file__).parent.parent.parent / "docs" / "gan.md"


@pytest.fixture
def short(gan_run) -> list[str]:
    return [*gan_run, "max_steps=2", "batch_images=4"]


def test_listing_of_the_page_loads_an_exported_generator(short, train, compose):
    run = train(*short)
    export_run(compose("export", [f"run={run.path}"]))
    (listing,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    folder = run.path / "exports" / "step-00000002"
    listing, num_changed = re.subn(r'Path\("runs/.*?"\)', f"Path({str(folder)!r})", listing)
    assert num_changed == 1
    names: dict = {}
    exec(listing, names)
    assert names["images"].shape == (16, 1, 28, 28)
    _, module = load_checkpoint(run, "last")
    noise = normal(evaluation_keys(3, torch.arange(5)), 1, names["generator"].noise_size)
    with torch.no_grad():
        images = to_bytes(names["generator"](noise))
    settings = {"seed": 3, "truncation": 1.0, "classes": None}
    np.testing.assert_array_equal(images, module.synthesize(range(5), **settings))
    np.testing.assert_array_equal(images[3:], module.synthesize(range(3, 5), **settings))
    trained = load_file(folder / "generator.safetensors")
    averaged = load_file(folder / "ema.safetensors")
    assert any(not torch.equal(averaged[name], trained[name]) for name in averaged)


def test_run_on_other_images_starts_from_the_networks_and_not_from_the_classifier(short, train):
    source = train(*short)
    resting = [*short, "module.optimizer.lr=0", "max_steps=1", f"init_from={source.path}"]
    tuned = train(*resting, "run.name=tuned", "corpus.labels=false")
    first, other = (
        load_file(r.find_checkpoint("best") / "weights.safetensors") for r in (source, tuned)
    )
    own = {name for name in other if name.startswith("scores.")}
    assert other["scores.extractor.head"].shape != first["scores.extractor.head"].shape
    assert not torch.equal(other["scores.extractor.weight0"], first["scores.extractor.weight0"])
    networks = {name for name in other if name.startswith(("generator.", "discriminator."))}
    assert networks | own | {name for name in other if name.startswith(("ema.", "aug"))} == {*other}
    assert all(torch.equal(other[name], first[name]) for name in networks)
