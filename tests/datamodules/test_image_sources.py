"""Each kind of source against what Pillow, numpy and scikit-learn read of it."""

import gzip
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image
from sklearn.datasets import load_digits

from tests.datamodules.made_up_images import (
    draw_pixels,
    encode,
    make_images,
    picture,
    read_images,
    read_members,
    seen,
    write_folder,
    write_idx,
)


def with_alpha(pixels: Any) -> Image.Image:
    return Image.fromarray(np.concatenate([pixels, pixels[:, :, :1]], axis=2))


ENCODERS = {
    "colour.png": lambda p: encode(picture(p)),
    "photo.JPG": lambda p: encode(picture(p), "JPEG"),
    "print.jpeg": lambda p: encode(picture(p).convert("CMYK"), "JPEG"),
    "modern.webp": lambda p: encode(picture(p), "WEBP", lossless=True),
    "old.bmp": lambda p: encode(picture(p), "BMP"),
    "grey.png": lambda p: encode(picture(p).convert("L")),
    "bits.png": lambda p: encode(picture(p).convert("1")),
    "palette.png": lambda p: encode(picture(p).quantize(16)),
    "clear palette.png": lambda p: encode(picture(p).quantize(16), transparency=bytes([9] * 16)),
    "alpha.png": lambda p: encode(with_alpha(p)),
    "named otherwise.jpg": lambda p: encode(picture(p), "PNG"),
}


@pytest.mark.parametrize("stored_as", ["png", "raw"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")
def test_folder_of_all_kinds_gives_what_pillow_reads(
    stored_as: str, channels: int, tmp_path: Path
) -> None:
    expected = []
    for label, name in enumerate(["cats", "dogs"]):
        (tmp_path / "set" / name / "deep").mkdir(parents=True)
        for number, (file, to_bytes) in enumerate(ENCODERS.items()):
            path = tmp_path / "set" / name / ("deep" if number % 2 else "") / file
            path.write_bytes(to_bytes(draw_pixels(100 * label + number, 6 + number, 9)))
            expected.append((Image.open(path).convert("L" if channels == 1 else "RGB"), label))
    (tmp_path / "set" / ".hidden").mkdir()
    (tmp_path / "set" / ".hidden" / "x.png").write_bytes(b"no image")
    (tmp_path / "set" / "notes.txt").write_bytes(b"no image")
    prepared = make_images(tmp_path / "set", channels=channels, format=stored_as).prepare(tmp_path)
    assert read_images(prepared) == seen(expected)
    assert prepared.facts["classes"] == ["cats", "dogs"]
    assert prepared.facts["num_classes"] == 2
    assert prepared.facts["channels"] == channels
    assert sum(prepared.facts["images"].values()) == 2 * len(ENCODERS)
    bounds = {"min_height": 6, "max_height": 16, "min_width": 9, "max_width": 9}
    assert prepared.facts["resolution"] == bounds


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_what_needs_no_change_stays_byte_for_byte(kind: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    pixels = [draw_pixels(n, 8, 8) for n in range(20)]
    # Files that our encoder would not write so.
    options = {"png": {"compress_level": 1}, "jpeg": {"quality": 60, "subsampling": 0}}[kind]
    files = [encode(picture(p), kind.upper(), **options) for p in pixels]
    for number, content in enumerate(files):
        (tmp_path / "set" / f"{number}.{kind}").write_bytes(content)
    extension = {"png": "png", "jpeg": "jpg"}[kind]

    def stored(**settings: Any) -> list[bytes]:
        prepared = make_images(tmp_path / "set", format=kind, **settings).prepare(tmp_path)
        found = (read_members(prepared, split) for split in ("train", "val", "test"))
        return sorted(sample[extension] for samples in found for sample in samples)

    assert stored() == stored(channels=3, resolution=8) == sorted(files)
    assert not set(stored(channels=1)) & set(files)
    assert not set(stored(resolution=4)) & set(files)
    if kind == "png":
        lossless = make_images(tmp_path / "set", format="raw").prepare(tmp_path)
        assert read_images(lossless) == seen([(p, None) for p in pixels])


def test_images_are_cut_to_the_central_square_and_resized(tmp_path: Path) -> None:
    root = tmp_path / "set"
    root.mkdir()
    shapes = [(16, 16), (16, 27), (31, 16), (5, 8)]
    pixels = [draw_pixels(n, *shape) for n, shape in enumerate(shapes)]
    for number, array in enumerate(pixels):
        (root / f"{number}.png").write_bytes(encode(picture(array)))
    squares = [pixels[0], pixels[1][:, 5:21], pixels[2][7:23], pixels[3][:, 1:6]]
    whole = {"resolution": 8, "val_fraction": 0, "test_fraction": 0, "format": "raw"}
    for name in ("bilinear", "bicubic", "lanczos", "box"):
        prepared = make_images(root, resize=name, **whole).prepare(tmp_path)
        method = getattr(Image.Resampling, name.upper())
        expected = [(picture(s).resize((8, 8), method), None) for s in squares]
        assert read_images(prepared, "train") == seen(expected)
        assert set(prepared.facts["resolution"].values()) == {8}
    # Of halves, `box` is the mean of four pixels, rounded once for each side.
    found = list(read_images(prepared, "train"))
    means = squares[0].reshape(8, 2, 8, 2, 3).mean(axis=(1, 3))
    near = [np.frombuffer(content, np.uint8).reshape(8, 8, 3) - means for content, _, _ in found]
    assert min(np.abs(difference).max() for difference in near) <= 1


def test_files_of_a_folder_are_mixed(tmp_path: Path) -> None:
    write_folder(tmp_path / "set")
    prepared = make_images(tmp_path / "set", shard_mb=1 / 1024).prepare(tmp_path)
    expected = seen([(picture(draw_pixels(n)), int(n % 2 == 0)) for n in range(60)])
    assert read_images(prepared) == expected  # "a c" comes before "b"
    labels = [int(sample["cls"]) for sample in read_members(prepared, "train")]
    half = labels[: len(labels) // 2]
    assert 0.2 * len(half) < sum(half) < 0.8 * len(half)  # by name it would be 0
    assert prepared.facts["shards"]["train"] > 5
    assert prepared.facts["class_counts"]["train"] == [labels.count(0), labels.count(1)]


@pytest.mark.parametrize("is_labelled", [True, False])
def test_labels_of_dataset_json_are_taken(is_labelled: bool, tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", classes=("00000", "00001"))
    numbers = {f"{n % 2:05d}/{n}.png": n % 5 for n in range(60)}
    labels = list(numbers.items()) if is_labelled else None
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    prepared = make_images(root).prepare(tmp_path)
    expected = [(picture(draw_pixels(n)), n % 5 if is_labelled else None) for n in range(60)]
    assert read_images(prepared) == seen(expected)
    assert prepared.facts["num_classes"] == (5 if is_labelled else None)
    unlabelled = make_images(root, labels=False).prepare(tmp_path)
    assert read_images(unlabelled) == seen([(image, None) for image, _ in expected])


@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx_files_of_mnist_are_read(end: str, tmp_path: Path) -> None:
    root = tmp_path / "raw"
    root.mkdir()
    splits = {"train": draw_pixels(0, 300, 7, 5), "t10k": draw_pixels(1, 50, 7, 5)}
    expected = {}
    for number, (split, images) in enumerate(splits.items()):
        labels = np.arange(len(images), dtype=np.uint8) % (10 - number)
        write_idx(root / f"{split}-images-idx3-ubyte{end}", images)
        write_idx(root / f"{split}-labels-idx1-ubyte{end}", labels)
        expected[split] = seen(list(zip(images, labels.tolist(), strict=True)))
    if end:  # as torchvision leaves them: both, of which one is taken
        shutil.copy(root / f"t10k-images-idx3-ubyte{end}", root / "copy")
        content = gzip.decompress((root / "copy").read_bytes())
        (root / "t10k-images-idx3-ubyte").write_bytes(content)
    prepared = make_images(root, format="raw").prepare(tmp_path)
    assert read_images(prepared, "test") == expected["t10k"]
    assert read_images(prepared, "train", "val") == expected["train"]
    assert prepared.facts["shards"]["train"] == 3  # of units of 4 KiB of pixels
    file = make_images(root / f"train-images-idx3-ubyte{end}", labels=False).prepare(tmp_path)
    assert read_images(file) == seen([(image, None) for image in splits["train"]])


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("label", ["cls", "json"])
def test_shards_of_others_are_rewritten(end: str, label: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    pattern = str(tmp_path / "set" / f"stock-%04d.tar{end}")
    expected = []
    with webdataset.ShardWriter(pattern, maxcount=13, verbose=0) as writer:
        for number in range(40):
            pixels = draw_pixels(number)
            name, content = [
                ("png", encode(picture(pixels))),
                ("jpg", encode(picture(pixels), "JPEG")),
                ("webp", encode(picture(pixels), "WEBP")),
                ("npy", pixels),
            ][number % 4]
            image = pixels if name == "npy" else Image.open(io.BytesIO(content))
            expected.append((image, number % 3))
            labels = {"cls": number % 3} if label == "cls" else {"json": {"kind": number % 3}}
            writer.write({"__key__": f"k/{number:04d}", name: content, "txt": "a", **labels})
    prepared = make_images(tmp_path / "set", label_key="kind").prepare(tmp_path)
    assert read_images(prepared) == seen(expected)
    assert prepared.facts["num_classes"] == 3
    shards = sorted(str(path) for path in (tmp_path / "set").glob("*.tar*"))
    some = make_images(shards[1:3], label_key="kind").prepare(tmp_path)
    assert read_images(some) == seen(expected[13:39])


def test_digits_of_scikit_learn_are_resized(tmp_path: Path) -> None:
    settings = {"resolution": 12, "resize": "bicubic", "shard_mb": 64, "format": "raw"}
    prepared = make_images("builtin:digits", **settings).prepare(tmp_path)
    digits: Any = load_digits()
    grey = [Image.fromarray(np.round(image * 255 / 16).astype(np.uint8)) for image in digits.images]
    images = [image.resize((12, 12), Image.Resampling.BICUBIC) for image in grey]
    assert read_images(prepared) == seen(list(zip(images, digits.target.tolist(), strict=True)))
    assert prepared.facts["num_classes"] == 10
    assert prepared.facts["channels"] == 1
