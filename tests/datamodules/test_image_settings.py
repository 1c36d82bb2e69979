"""What a datamodule of images refuses, and its configuration."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import DictConfig

from datamodules.corpora import Corpus
from datamodules.facts import PreparedData
from datamodules.images import ImageDataModule
from datamodules.text import TextDataModule
from launch.prepare import prepare
from tests.datamodules.made_up_images import as_it_is, make_data, make_images, write_folder
from tests.datamodules.stream_settings import STREAM


@pytest.fixture
def prepared(tmp_path: Path) -> PreparedData:
    return make_images(write_folder(tmp_path / "set")).prepare(tmp_path / "data")


def test_settings_that_cannot_be_are_refused(prepared: PreparedData) -> None:
    cases: dict[str, dict[str, Any]] = {
        r"datamodule.tail=pad_mask -> .* drop or carry": {"tail": "pad_mask"},
        r"datamodule.resize=nearest -> unknown": {"resize": "nearest"},
        r"datamodule.channels=4 -> unknown -> choose one of 1, 3": {"channels": 4},
        r"datamodule.flip=both -> ": {"flip": "both"},
        r"datamodule.resolution=0 -> ": {"resolution": 0},
        r"datamodule.eval_images=1.5 -> ": {"eval_images": 1.5},
    }
    for message, settings in cases.items():
        with pytest.raises(ValueError, match=message):
            make_data(prepared, **settings)


def test_data_of_another_kind_or_shape_is_refused_when_it_is_found(
    prepared: PreparedData, make_corpus: Callable[..., Corpus], jsonl: Path, tmp_path: Path
) -> None:
    text = make_corpus(jsonl).prepare(tmp_path / "data")
    with pytest.raises(ValueError, match=r"datamodule=images -> the corpus has text, .*=text"):
        make_data(text).setup("fit")
    with pytest.raises(ValueError, match=r"datamodule=text -> the corpus has images, .*=images"):
        TextDataModule(
            **{"sequence_length": 8, "packing": "cut", "document_mask": False},
            **{"corpus": as_it_is(prepared), "data_dir": "unused", **STREAM},
            **{"batch_samples": 4, "micro_batch": 2, "max_samples": 8},
        ).setup("fit")
    with pytest.raises(ValueError, match=r"datamodule.channels=1 -> .* have 3 -> .*channels=1"):
        make_data(prepared, channels=1).setup("fit")
    message = r"datamodule.resolution=9 -> .* 8 to 8 rows and 8 to 8 columns -> .*resolution=9, or"
    with pytest.raises(ValueError, match=message):
        make_data(prepared, resolution=9).setup("fit")
    make_data(prepared, resolution=9, resize="box").setup("fit")


def test_configurations_prepare_and_read_images(
    compose: Callable[..., DictConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "set", 40)
    overrides = ["corpus=images", f"corpus.path={tmp_path / 'set'}", f"data_dir={tmp_path}"]
    overrides += ["corpus.test_fraction=0", "corpus.val_fraction=0.3"]
    prepare(compose("prepare", [*overrides, "corpus.num_processes=1"]))
    printed = capsys.readouterr().out
    assert "images: 8 x 8 pixels, channels: 3" in printed
    # A run asks for the size that it trains on.
    sizes = ["datamodule=images", "datamodule.resolution=16", "datamodule.num_workers=0"]
    config = compose("train", [*overrides, *sizes, "corpus.num_processes=1"])
    config.plan = {"batch_samples": 8, "micro_batch": 4, "max_samples": 80}
    data = instantiate(config.datamodule, _convert_="all")
    assert type(data) is ImageDataModule
    assert next(iter(data.train_dataloader()))["images"].shape == (4, 3, 16, 16)


def test_digits_are_configured(
    compose: Callable[..., DictConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(compose("prepare", ["corpus=digits", f"data_dir={tmp_path}"]))
    printed = capsys.readouterr().out
    assert "images: 28 x 28 pixels, channels: 1" in printed
    assert "classes: 10, " in printed
