"""Every file of the configuration tree is used, and every experiment takes a step."""

import json
from pathlib import Path

import numpy as np
import pytest

from launch.export import build_without_values
from tests.datamodules.made_up_images import draw_pixels, write_folder, write_idx

CONF = Path(__file__).parent.parent / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
DEBUGS = sorted(path.stem for path in (CONF / "debug").glob("*.yaml"))


SMALL_TRANSFORMER = "{num_heads: 2, head_width: 8, width: 16, mlp_width: 16}"
SMALL_RECURRENT = "{embedding_width: 8, encoder_width: 8, hidden_width: 16}"


@pytest.fixture
def small(data_dir, tmp_path) -> list[str]:
    """What makes any experiment small."""
    return [
        f"data_dir={data_dir}",
        f"runs_dir={tmp_path / 'runs'}",
        "trainer.accelerator=cpu",
        "batch_tokens=null",
        "batch_samples=4",
        "micro_batch=2",
        "datamodule.num_workers=0",
    ]


@pytest.fixture
def shrunken(small, text_file) -> list[str]:
    """What makes any GPT experiment small, whatever else it chooses."""
    return [
        *small,
        f"corpus.path={text_file}",
        "corpus.tokenizer=char",
        "datamodule.sequence_length=16",
        "module.network.num_layers=2",
        "module.network.num_heads=2",
        "module.network.width=16",
        "module.preview.max_new_tokens=4",
        "module.preview.prompts=[a]",
    ]


@pytest.fixture
def shrunken_pairs(small, pair_files, text_file, tmp_path) -> dict[str, list[str]]:
    """What makes each encoder-decoder experiment small."""
    texts = tmp_path / "texts.jsonl"
    lines = text_file.read_text().splitlines()
    texts.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    files = [f"corpus.train.{side}={path}" for side, path in pair_files.items()]
    pairs = [*small, *files, "datamodule.val_max_samples=4", "module.generation.max_new_tokens=4"]
    corrupted = [f"corpus.path={texts}", "corpus.vocab_size=300", "corpus.num_sentinels=4"]
    corrupted += ["datamodule.source_length=24", f"module.network={SMALL_TRANSFORMER}"]
    return {
        "seq2seq_quickstart": [
            *pairs,
            "corpus.train.path=null",
            "corpus.vocab_size=300",
            "datamodule.group_tokens=64",
            f"module.network={SMALL_TRANSFORMER}",
        ],
        "translation_small": [*pairs, f"module.network={SMALL_TRANSFORMER}"],
        "translation_lstm": [*pairs, f"module.network={SMALL_RECURRENT}"],
        "t5_base_span_corruption": [*small, *corrupted, "datamodule.val_max_samples=4"],
    }


@pytest.fixture(scope="module")
def image_folders(tmp_path_factory) -> dict[str, Path]:
    """Images of two classes as the experiments want them: IDX files of grey, a folder of colour."""
    root = tmp_path_factory.mktemp("images")
    write_folder(root / "colour")
    (root / "idx").mkdir()
    pixels = np.stack([draw_pixels(number, 28, 28, 1)[..., 0] for number in range(40)])
    write_idx(root / "idx" / "train-images-idx3-ubyte", pixels)
    write_idx(root / "idx" / "train-labels-idx1-ubyte", np.arange(40, dtype=np.uint8) % 2)
    return {"idx": root / "idx", "colour": root / "colour"}


@pytest.fixture
def shrunken_images(small, image_folders) -> dict[str, list[str]]:
    """What makes each GAN experiment small."""
    images = [*small, "batch_samples=null", "batch_images=4", "datamodule.val_max_samples=4"]
    images += ["module.scores.extractor.training_steps=1", "corpus.num_processes=1"]
    digits = [*images, "module.preset=dcgan_tiny"]
    colour = [*images, f"corpus.path={image_folders['colour']}"]
    return {
        "gan_quickstart": digits,
        "gan_mnist": [*digits, f"corpus.path={image_folders['idx']}"],
        "gan_cifar10_sngan": [*colour, "module.preset=sngan_tiny"],
        "gan_cifar10_r3gan": [*colour, "module.preset=r3gan_tiny", "datamodule.resolution=8"],
        "gan_ffhq256_r3gan": [*colour, "module.preset=r3gan_tiny", "datamodule.resolution=16"],
    }


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_takes_a_step(experiment, shrunken, shrunken_pairs, shrunken_images, train):
    overrides = (shrunken_pairs | shrunken_images).get(experiment, shrunken)
    debug = "one_round" if experiment in shrunken_images else "one_step"
    run = train(f"experiment={experiment}", f"debug={debug}", *overrides)
    assert run.summary["step"] == 1
    assert run.summary["samples"] == 4
    if experiment in shrunken_images:
        assert run.summary["images"] == 4
    elif experiment not in shrunken_pairs:
        assert run.summary["tokens"] == 64
    values = build_without_values(run.config).state_dict().values()
    assert all(value.is_meta for value in values)  # so that an export needs no memory for them


def test_overfit_overlay_learns_its_batch_by_heart(shrunken, train):
    options = ["module.optimizer.lr=0.01", "max_steps=150", "trainer.log_every_steps=150"]
    base = ["experiment=gpt_char_cpu", *shrunken, "micro_batch=null"]
    by_heart = train(*base, "debug=overfit", *options)
    rows = (by_heart.path / "metrics.jsonl").read_text().splitlines()
    assert '"train/loss": 0.' in rows[-2]
    assert by_heart.summary["val/loss"] > 2  # and nothing else


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")
def test_profile_overlay_reports_operators(shrunken, train):
    run = train("experiment=gpt_char_cpu", *shrunken, "debug=profile", "max_steps=5")
    assert "aten::mm" in (run.path / "fit-profile.txt").read_text()


def test_debug_overlays_are_all_tried():
    assert DEBUGS == ["one_round", "one_step", "overfit", "profile"]


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda p: p.stem)
def test_file_begins_by_saying_what_it_is_for(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @")]
    assert lines[0].startswith("# ")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_gives_its_command(name):
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    assert f"python -m launch.train experiment={name}" in text
