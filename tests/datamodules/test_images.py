"""The datamodule of images, from a prepared folder on."""

import io
import shutil
import warnings
from itertools import islice
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import write
from datamodules.facts import PreparedData
from datamodules.image_files import open_image, read_pixels
from datamodules.order import uniform
from datamodules.tar import BadSampleError
from tests.datamodules import by_hand
from tests.datamodules.made_up_images import (
    Seen,
    draw_pixels,
    make_data,
    make_images,
    read_images,
    seen,
    write_folder,
)

Sample = tuple[bytes, int, int]
"""Pixels, label and key."""


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PreparedData:
    monkeypatch.setattr(write, "BLOCK_BYTES", 4096)
    return make_images(write_folder(tmp_path / "set", 100)).prepare(tmp_path / "data")


def train(prepared: Any, world: int = 1, **own: Any) -> list[Sample]:
    """Samples in the global order, from those of each rank."""
    ranks = []
    for rank in range(world):
        batches = list(make_data(prepared, rank, world, **own).train_dataloader())
        for batch in batches:
            assert batch.keys() == {"images", "labels", "keys"}
            assert batch["images"].dtype == torch.uint8
            assert batch["images"].shape == (2, 3, 8, 8)
            assert batch["images"].is_contiguous()
            assert batch["labels"].dtype == batch["keys"].dtype == torch.int64
        ranks.append([sample for batch in batches for sample in samples_in(batch)])
    return [sample for samples in zip(*ranks, strict=True) for sample in samples]


def samples_in(batch: Any) -> list[Sample]:
    images = batch["images"].permute(0, 2, 3, 1).numpy()
    columns = (batch["labels"].tolist(), batch["keys"].tolist())
    return list(zip((image.tobytes() for image in images), *columns, strict=True))


def without_keys(samples: list[Sample]) -> Seen:
    return seen([(np.frombuffer(s[0], np.uint8).reshape(8, 8, 3), s[1]) for s in samples])


def mirrored(content: bytes) -> bytes:
    return np.frombuffer(content, np.uint8).reshape(8, 8, 3)[:, ::-1].tobytes()


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (3, 0), (2, 2)])
def test_stream_is_the_same_for_any_ranks_workers_and_resumes(
    world: int, workers: int, prepared: PreparedData
) -> None:
    reference = train(prepared, flip=True)
    assert len(reference) == len({key for _, _, key in reference}) == 240
    data = make_data(prepared, 1, 2, flip=True)
    list(islice(iter(data.train_dataloader()), 20))  # 2 ranks x 20 x 2 images: 6 steps and a third
    state = data.state_dict()
    assert state["position"] == 72
    resumed = train(prepared, world, flip=True, state=state, num_workers=workers)
    assert resumed == reference[72:]
    assert train(prepared, world, flip=True, num_workers=workers) == reference
    assert train(prepared, flip=True, seed=8) != reference


def test_epoch_has_each_image_once(prepared: PreparedData) -> None:
    expected = read_images(prepared, "train")
    size = expected.total()
    samples = train(prepared, max_samples=2 * size // 12 * 12)
    assert without_keys(samples[:size]) == expected
    assert (
        sum(label for _, label, _ in samples[:size]) == prepared.facts["class_counts"]["train"][1]
    )


def test_flips_follow_from_the_keys(prepared: PreparedData) -> None:
    plain, flipped = train(prepared, max_samples=600), train(prepared, max_samples=600, flip=True)
    assert [sample[1:] for sample in plain] == [sample[1:] for sample in flipped]
    is_flipped = [p[0] != f[0] for p, f in zip(plain, flipped, strict=True)]
    for p, f, is_mirror in zip(plain, flipped, is_flipped, strict=True):
        assert f[0] == (mirrored(p[0]) if is_mirror else p[0])
    assert 240 < sum(is_flipped) < 360  # of 600: 300, give or take five standard deviations
    # Others in each epoch: most images come both ways.
    ways: dict[bytes, set[bool]] = {}
    for (content, _, _), is_mirror in zip(plain, is_flipped, strict=True):
        ways.setdefault(content, set()).add(is_mirror)
    assert sum(len(way) == 2 for way in ways.values()) > 0.9 * len(ways)
    # What else is drawn from a key has nothing to do with the flip.
    draws = [uniform(np.array([key]).view(np.uint64)[0], 1)[0] < 0.5 for _, _, key in plain]
    agreeing = sum(a == b for a, b in zip(draws, is_flipped, strict=True))
    assert 240 < agreeing < 360


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_counts_each_image_once(world: int, split: str, prepared: PreparedData) -> None:
    counted: list[tuple[Any, int]] = []
    lengths = set()
    for rank in range(world):
        batches = list(
            getattr(make_data(prepared, rank, world, flip=True), f"{split}_dataloader")()
        )
        lengths.add(len(batches))
        for batch in batches:
            assert batch.keys() == {"images", "labels", "counted"}
            assert batch["images"].shape == (5, 3, 8, 8)
            images, is_counted = batch["images"].permute(0, 2, 3, 1).numpy(), batch["counted"]
            pairs = zip(images[is_counted], batch["labels"][is_counted].tolist(), strict=True)
            counted += pairs
    assert len(lengths) == 1
    assert seen(counted) == read_images(prepared, split)


def test_some_images_are_spread_over_a_split(prepared: PreparedData) -> None:
    data = make_data(prepared, 1, 3, flip=True)
    whole, labels = data.some("train", 1000)
    assert labels is not None
    assert whole.dtype == torch.uint8
    num_images = prepared.facts["images"]["train"]
    assert whole.shape == (num_images, 3, 8, 8)
    pairs = list(zip(whole.permute(0, 2, 3, 1).numpy(), labels.tolist(), strict=True))
    assert seen(pairs) == read_images(prepared, "train")
    few, few_labels = data.some("train", 7)
    places = [number * num_images // 7 for number in range(7)]
    assert torch.equal(few, whole[places])
    assert few_labels is not None
    assert torch.equal(few_labels, labels[places])
    shutil.rmtree(prepared.path / "test")
    with pytest.raises(ValueError, match=r"has no test split -> "):
        data.some("test", 1)


def test_images_without_labels_have_none(prepared: PreparedData, tmp_path: Path) -> None:
    corpus = make_images(tmp_path / "set", labels=False, format="raw", channels=1)
    data = make_data(corpus, data_dir=str(tmp_path / "data"), channels=1)
    assert next(iter(data.train_dataloader())).keys() == {"images", "keys"}
    images, labels = data.some("val", 3)
    assert labels is None
    assert images.shape == (3, 1, 8, 8)


def test_images_are_resized_as_they_are_read(prepared: PreparedData, tmp_path: Path) -> None:
    for size in (4, 11):
        images, _ = make_data(prepared, resolution=size, resize="bicubic").some("val", 99)
        expected = [
            Image.fromarray(np.frombuffer(pixels, np.uint8).reshape(8, 8, 3)).resize(
                (size, size), Image.Resampling.BICUBIC
            )
            for pixels, _, _ in read_images(prepared, "val").elements()
        ]
        found = [(image, None) for image in images.permute(0, 2, 3, 1).numpy()]
        assert seen(found) == seen([(image, None) for image in expected])


def test_reading_leaves_the_generators_of_others_alone(prepared: PreparedData) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    data = make_data(prepared, flip=True, num_workers=0)
    list(data.train_dataloader())
    data.some("val", 3)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def replace_image(prepared: PreparedData, number: int, members: dict[str, bytes]) -> None:
    """Write the training shards anew, with other members in one sample, under a right index."""
    folder, first = prepared.path / "train", 0
    for shard in sorted(folder.glob("*.tar")):
        samples = by_hand.read_with_webdataset(shard)
        for place, sample in enumerate(samples):
            sample.update(members if first + place == number else {})
        first += len(samples)
        named = [(s.pop("__key__"), s) for s in samples]
        files = [(f"{key}.{name}", s[name]) for key, s in named for name in sorted(s)]
        by_hand.write_tar(shard, files)
    by_hand.write_index(folder, {"png": {"codec": "png"}, "cls": {"codec": "cls"}})


def png(height: int, width: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(draw_pixels(0, height, width)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"png": png(8, 8)[:-40]}, r"damaged or cut short"),
        ({"png": b"no image"}, r"no whole file of PNG"),
        ({"png": png(8, 9)}, r"8 x 9 pixels, and datamodule.resolution=8"),
        ({"cls": b"2"}, r"its label is 2, and there are 2 classes"),
        ({"cls": b"-1"}, r"its label is -1"),
        ({"cls": b"cat"}, r"invalid literal"),
    ],
)
def test_image_that_cannot_be_decoded_is_a_bad_sample(
    members: dict[str, bytes], message: str, prepared: PreparedData
) -> None:
    intact, _ = make_data(prepared).some("train", 100)
    replace_image(prepared, 3, members)
    message = rf"data set .*train: .*{message}.*\(shard train-\d+.tar, key \d+\)"
    with pytest.raises(BadSampleError, match=message):
        make_data(prepared).some("train", 100)
    found, _ = make_data(prepared, on_bad_sample="substitute").some("train", 100)
    assert torch.equal(found[3], intact[4])
    intact[3] = intact[4]
    assert torch.equal(found, intact)


@pytest.mark.parametrize(("position", "byte"), [(8, 1), (21, 44), (26, 66)])
def test_damaged_header_of_an_array_is_a_value_error(position: int, byte: int) -> None:
    file = io.BytesIO()
    np.save(file, draw_pixels(0))
    content = bytearray(file.getvalue())
    content[position] = byte
    with pytest.raises((TokenError, SyntaxError, TypeError)):  # what numpy says
        np.load(io.BytesIO(content))
    with pytest.raises(ValueError, match=r"it is damaged or cut short \("):
        read_pixels(memoryview(content), 3, is_array=True)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_image_of_too_many_pixels_is_refused_whatever_is_done_about_warnings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    filters, found, plain = list(warnings.filters), [], Image.open

    def watched(*arguments: Any, **options: Any) -> Image.Image:
        found.append(list(warnings.filters))
        return plain(*arguments, **options)

    monkeypatch.setattr(Image, "open", watched)
    open_image(png(8, 8))
    assert found == [filters]  # by which another thread may go just now
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 63)
    with pytest.raises(ValueError, match="too many pixels: 8 x 8, and Pillow's limit is 63 pixels"):
        open_image(png(8, 8))
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", None)
    open_image(png(8, 8))
