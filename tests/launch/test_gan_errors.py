"""Impossible settings of GANs, and bad images: one clear message each, before or in training."""

import re

import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from launch import runtime
from launch.completion import complete
from launch.prepare import prepare
from tests.datamodules.by_hand import read_with_webdataset, write_index, write_tar
from tests.launch.gan_runs import weights
from trainers.checkpoint import list_checkpoints

REFUSED = {
    r"datamodule.channels=3 -> the images .* have 1 -> .*channels=1": [
        "datamodule.channels=3",
        "corpus.channels=1",
    ],
    r"datamodule.resolution=32 -> .* have 28 to 28 rows .* datamodule.resize to": [
        "datamodule.resolution=32",
        "corpus.resolution=28",
    ],
    r"datamodule.resolution=30 -> a DCGAN has layers for 28, 32": ["datamodule.resolution=30"],
    r"module.conditional=true -> the data has no labels -> .*": [
        "module.conditional=true",
        "corpus.labels=false",
    ],
    r"checkpoints.monitor=val/fid -> .* -> use one of: val/frechet": [
        "checkpoints.monitor=val/fid"
    ],
    r"3 ranks -> .* does not divide": ["trainer.devices=3", "strategy=ddp"],
    r"micro_batch=3 -> .* does not divide -> use one of": ["micro_batch=3"],
    r"batch_tokens=64 -> .* no fixed number of tokens -> use batch_samples, or _images": [
        "batch_images=null",
        "batch_tokens=64",
    ],
    r"datamodule=images -> the corpus has text, .* -> set datamodule=text": [
        "corpus=text",
        "corpus.path=$text",
    ],
    r"datamodule.resolution -> this datamodule has no such setting -> .*module=gan with data": [
        "datamodule=text",
        "datamodule.val_max_samples=8",
    ],
    r"gradient_clip of generator -> .* parts are discriminator, generator -> give each": [
        "module.optimizer.gradient_clip={generator: 1}"
    ],
    r"module.loss.name=hing -> unknown -> .*hinge": ["module.loss.name=hing"],
}
"""What is said before anything is trained, and overrides."""
REFUSED_BY_MODULE = {
    r"module.loss.generator_every=0 -> .* -> 1 or more": ["module.loss.generator_every=0"],
    r"module.loss.one_noise=2 -> .* -> true or false": ["module.loss.one_noise=2"],
    r"module.preset=dcgn -> unknown -> did you mean dcgan": ["module.preset=dcgn"],
    r"module.network.blocks_per_stage -> no such key": ["module.network.blocks_per_stage=2"],
    r"module.batch_norm=sync -> unknown -> choose synced or per_rank": ["module.batch_norm=sync"],
    r"module.augmentation.name=ada -> unknown -> .*adaptive": ["module.augmentation.name=ada"],
    r"module.augmentation.ops=\['hue'\] -> .* one channel": [
        "module.augmentation.name=adaptive",
        "module.augmentation.probability=0.1",
        "module.augmentation.ops=[hue]",
    ],
    r"module.augmentation.probability=null -> .*adaptive needs one -> set": [
        "module.augmentation.name=adaptive"
    ],
    r"module.augmentation.probability=0.5 -> .*name=none has none -> .*null": [
        "module.augmentation.probability=0.5"
    ],
    r"module.augmentation.probability=2 -> 2 is out of its bounds -> choose 0 to 1": [
        "module.augmentation.name=adaptive",
        "module.augmentation.probability=2",
    ],
    r"module.augmentation.probability=.* other keys -> give target, speed_images": [
        "module.augmentation.name=adaptive",
        "module.augmentation.probability={target: 0.6}",
    ],
    r"module.penalty.r1=-1 -> .* -> choose 0 to inf": ["module.penalty.r1=-1"],
    r"module.penalty.r2=None -> neither a number nor a ramp": ["module.penalty.r2=null"],
    r"module.penalty.every_steps=0 -> .* -> 1 or more": ["module.penalty.every_steps=0"],
    r"module.penalty.r1=.* -> a ramp has other keys -> give start, end, images and shape": [
        "module.penalty.r1={start: 1, end: 0}"
    ],
    r"module.penalty.r1.start=a -> no number": [
        "module.penalty.r1={start: a, end: 0, images: null, shape: linear}"
    ],
    r"module.optimizer.lr.shape=step -> unknown -> choose linear or cosine": [
        "module.optimizer.lr={start: 1, end: 0, images: null, shape: step}"
    ],
    r"module.optimizer.name=adamw -> .* -> choose one of adam, sgd": [
        "module.optimizer.name=adamw"
    ],
    r"module.optimizer.adam.beta2=1 -> .* out of its bounds": ["module.optimizer.adam.beta2=1"],
    r"module.optimizer.adam.eps=0 -> .* -> above 0": ["module.optimizer.adam.eps=0"],
    r"module.optimizer.sgd.momentum=1 -> .* -> 0 to below 1": ["module.optimizer.sgd.momentum=1"],
    r"module.ema.half_life_images=-1 -> .* -> choose 0 to inf": ["module.ema.half_life_images=-1"],
    r"module.ema.ramp_up=0 -> .* -> above 0": ["module.ema.ramp_up=0"],
    r"module.pictures.grid.rows=0 -> .* 1 or more, or .*=null for no such picture": [
        "module.pictures.grid.rows=0"
    ],
    r"module.monitor=val/fid -> no score of classifier.* -> choose val/frechet_distance or": [
        "module.monitor=val/fid"
    ],
}
"""The same of settings that a GAN alone looks at."""


@pytest.fixture
def settings(gan_run):
    return [*gan_run, "batch_images=8", "max_steps=1"]


@pytest.fixture
def fails(train, text_file):
    """Train what must fail; give the message that is printed."""

    def fail(*overrides):
        with pytest.raises(Exception, match=r".") as error:
            train(*(override.replace("$text", str(text_file)) for override in overrides))
        printed = runtime.explain(error.value, "train")
        assert printed is not None, error.value
        return printed

    return fail


@pytest.mark.parametrize("message", REFUSED)
def test_impossible_setting_is_refused(message, settings, fails, tmp_path):
    printed = fails(*settings, *REFUSED[message])
    assert re.search(message, printed), printed
    assert not list_checkpoints(tmp_path / "runs" / "digits" / "checkpoints")


@pytest.fixture(scope="module")
def completed(compose, gan_settings):
    config = compose("train", [*gan_settings, "batch_images=8", "max_steps=1"])
    complete(config, 1)
    return config


@pytest.mark.parametrize("message", REFUSED_BY_MODULE)
def test_impossible_setting_of_a_gan_is_refused(message, completed):
    changes = OmegaConf.from_dotlist(REFUSED_BY_MODULE[message])
    with pytest.raises(InstantiationException) as error:
        instantiate(OmegaConf.merge(completed, changes).module, _convert_="all")
    printed = runtime.explain(error.value, "train")
    assert printed is not None, error.value
    assert re.search(message, printed), printed


@pytest.mark.parametrize(
    ("module", "others"),
    [
        ("gan", ["datamodule=text", "corpus=text", "corpus.path=$text"]),
        ("gan", ["datamodule=denoising", "corpus=digits"]),
        ("gpt", ["datamodule=images", "corpus=digits"]),
    ],
)
def test_parts_that_do_not_go_together_are_said_to(module, others, data_dir, fails, tmp_path):
    common = [f"data_dir={data_dir}", f"runs_dir={tmp_path}", "batch_samples=8", "max_steps=1"]
    printed = fails(f"module={module}", *others, *common, "trainer.accelerator=cpu")
    assert re.search("module=gan with datamodule=images|and a module for it", printed), printed


BAD = {
    "no whole file of PNG": {"png": b"no image"},
    "its label is 10, and there are 10 classes": {"cls": b"10"},
}


def damage(folder, changes):
    """Change a sample of the first training shard, under a right index."""
    shard = min((folder / "train").glob("*.tar"))
    samples = read_with_webdataset(shard)
    samples[5].update(changes)
    named = [(sample.pop("__key__"), sample) for sample in samples]
    write_tar(shard, [(f"{k}.{name}", s[name]) for k, s in named for name in sorted(s)])
    write_index(shard.parent, {"png": {"codec": "png"}, "cls": {"codec": "cls"}})


@pytest.mark.parametrize("message", BAD)
def test_bad_image_is_named_or_substituted(message, settings, fails, train, compose, tmp_path):
    data = ["corpus.format=png", f"data_dir={tmp_path / 'data'}"]
    corpus = ["corpus=digits", "+datamodule={resolution: 28, channels: 1}"]
    prepare(compose("prepare", [*corpus, *data, "corpus.num_processes=1"]))
    (folder,) = (tmp_path / "data").glob("digits-*")
    damage(folder, BAD[message])
    all_images = [
        *settings,
        *data,
        "module.conditional=true",
        "batch_images=1437",
        "max_steps=1",
        "micro_batch=479",
    ]
    printed = fails(*all_images)
    assert re.search(rf"{message}.*\(shard train-000000.tar, key \w+\)", printed), printed
    run = train(*all_images, "run.name=substituted", "datamodule.on_bad_sample=substitute")
    assert all(tensor.isfinite().all() for tensor in weights(run).values())
