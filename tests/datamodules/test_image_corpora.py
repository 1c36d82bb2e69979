import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from datamodules.corpora import Corpus
from datamodules.inspection import inspect_data
from datamodules.prepared import PreparedCorpus
from tests.datamodules.by_hand import npy, write_tar
from tests.datamodules.made_up_images import (
    draw_pixels,
    encode,
    make_images,
    picture,
    read_images,
    seen,
    write_folder,
    write_idx,
)
from tests.datamodules.pair_texts import contents

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "set")


def test_bytes_do_not_depend_on_processes(folder: Path, tmp_path: Path) -> None:
    one = make_images(folder, num_processes=1, resolution=4).prepare(tmp_path / "one")
    two = make_images(folder, num_processes=2, resolution=4).prepare(tmp_path / "two")
    assert one.facts["shards"]["train"] > 2
    assert contents(one.path) == contents(two.path)
    assert not list(tmp_path.rglob("*.tmp"))
    other = make_images(folder, seed=1, resolution=4).prepare(tmp_path / "one")
    assert read_images(other) == read_images(one)
    assert read_images(other, "val") != read_images(one, "val")


KILLED = """
import json, os, signal, sys
from datamodules.image_corpora import ImageCorpus
from datamodules.write import ShardWriter

finish, count = ShardWriter.finish, 0

def finish_or_die(self):
    global count
    count += 1
    if count == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return finish(self)

ShardWriter.finish = finish_or_die
ImageCorpus(**json.loads(sys.argv[1])).prepare(sys.argv[2])
"""


def test_killed_preparation_is_finished_by_the_next(folder: Path, tmp_path: Path) -> None:
    corpus = make_images(folder)
    arguments = [json.dumps(corpus.__dict__), str(tmp_path / "killed")]
    command = [sys.executable, "-c", KILLED, *arguments]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    path = next((tmp_path / "killed").glob("images-*"))
    assert not (path / "dataset.json").exists()
    assert len(list((path / "units").glob("*.json"))) >= 2
    first, second = sorted((path / "train").glob("*.tar"))[:2]
    time = first.stat().st_mtime_ns
    second.write_bytes(b"damaged meanwhile")
    prepared = corpus.prepare(tmp_path / "killed")
    assert first.stat().st_mtime_ns == time
    assert contents(prepared.path) == contents(corpus.prepare(tmp_path / "undisturbed").path)


def test_equal_images_meet_in_one_split(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "b", folder / "copies")
    prepared = make_images(folder, labels=False).prepare(tmp_path)
    splits = [set(read_images(prepared, split)) for split in ("train", "val", "test")]
    assert all(splits)
    assert sum(map(len, splits)) == 60
    assert sum(prepared.facts["images"].values()) == 90


def test_splits_with_images_of_their_own_have_them_all(folder: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "other", 7, classes=("b",))
    paths = {"val_path": str(tmp_path / "other"), "test_fraction": 0}
    prepared = make_images(folder, **paths).prepare(tmp_path / "data")
    # Class b has the number it has in the other folder, where it is not the only one.
    assert read_images(prepared, "val") == seen([(draw_pixels(n), 1) for n in range(7)])
    assert prepared.facts["images"] == {"train": 60, "val": 7, "test": None}
    assert prepared.facts["class_counts"] == {"train": [30, 30], "val": [0, 7], "test": None}
    same = make_images(folder, **paths, val_fraction=0.3).prepare(tmp_path / "data")
    assert same == prepared  # a share that plays no part makes no other data


def test_bad_images_are_dropped_and_counted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = encode(picture(draw_pixels(3)))
    (folder / "b" / "cut.png").write_bytes(whole[:-30])
    (folder / "b" / "empty.png").write_bytes(b"")
    prepared = make_images(folder, on_bad_image="drop").prepare(tmp_path / "data")
    assert read_images(prepared) == seen([(draw_pixels(n), int(n % 2 == 0)) for n in range(60)])
    assert prepared.facts["bad_images"] == 2
    prepared.print_summary()
    printed = capsys.readouterr().out
    assert "dropped: 2 " in printed
    assert "images: 8 x 8 pixels, channels: 3" in printed
    assert f"classes: 2, {min(prepared.facts['class_counts']['train'])} to" in printed


def test_prepared_images_are_inspected(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = make_images(folder).prepare(tmp_path)
    inspect_data(str(prepared.path), 1)
    printed = capsys.readouterr().out
    assert "train, sample 0: 000000\n  cls, 1 bytes: '" in printed
    assert "'0' (a c)" in printed or "'1' (b)" in printed
    assert "bytes: 8 x 8 RGB\n" in printed
    shard = next((prepared.path / "val").glob("*.tar"))
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=rf"1 of \d+ files .*{shard.name}"):
        inspect_data(str(prepared.path), 1)


def test_images_from_afar_come_with_all_their_small_files(folder: Path, tmp_path: Path) -> None:
    prepared = make_images(folder).prepare(tmp_path / "data")
    fsspec.filesystem("memory").put(str(prepared.path), "/far-images", recursive=True)
    there = PreparedCorpus(name="copy", path="memory://far-images", storage_options={})
    copy = there.prepare(tmp_path / "copies")
    assert copy.facts["digest"] == prepared.facts["digest"]
    here = contents(copy.path)
    for name, content in contents(prepared.path).items():
        assert name.endswith(".tar") or here[name] == content


def bad_file(content: bytes) -> Callable[[Path], dict[str, Any]]:
    def write(root: Path) -> dict[str, Any]:
        (write_folder(root) / "b" / "bad.png").write_bytes(content)
        return {"path": root}

    return write


def flipped(content: bytes, offset: int) -> bytes:
    return content[:offset] + bytes([content[offset] ^ 4]) + content[offset + 1 :]


def shard(**members: bytes) -> Callable[[Path], dict[str, Any]]:
    def write(root: Path) -> dict[str, Any]:
        root.mkdir()
        named = [(f"k.{name.replace('_', '.')}", content) for name, content in members.items()]
        write_tar(root / "a.tar", [*named, ("l.png", PNG)])
        return {"path": root}

    return write


def idx(labels: Any, cut: int = 0) -> Callable[[Path], dict[str, Any]]:
    def write(root: Path) -> dict[str, Any]:
        root.mkdir()
        path = root / "train-images-idx3-ubyte"
        write_idx(path, draw_pixels(0, 9, 4, 4))
        path.write_bytes(path.read_bytes()[: 16 + 9 * 16 - cut])
        write_idx(root / "train-labels-idx1-ubyte", np.array(labels, np.uint8))
        return {"path": root}

    return write


def subfolders(*names: str, lone: bool = False, **settings: Any) -> Callable[[Path], Any]:
    def write(root: Path) -> dict[str, Any]:
        write_folder(root, classes=names)
        if lone:
            (root / "lone.png").write_bytes(PNG)
        if "labels_file" in settings:
            (root / "dataset.json").write_text(json.dumps(settings["labels_file"]))
        return {"path": root}

    return write


def other_val(root: Path) -> dict[str, Any]:
    write_folder(root.with_name("val"), 4, classes=("b", "new"))
    return {"path": write_folder(root), "val_path": str(root.with_name("val"))}


def unlike_val(root: Path) -> dict[str, Any]:
    return {"path": write_folder(root), "val_path": "builtin:digits"}


def own_test(root: Path) -> dict[str, Any]:
    idx([0] * 9)(root)
    write_idx(root / "t10k-images-idx3-ubyte", draw_pixels(1, 9, 4, 4))
    return {"path": root, "test_path": "builtin:digits"}


def beside_shards(root: Path) -> dict[str, Any]:
    shard(png=PNG)(root)
    (root / "c.png").write_bytes(PNG)
    return {"path": root}


def settings(**settings: Any) -> Callable[[Path], dict[str, Any]]:
    return lambda root: {"path": write_folder(root), **settings}


PNG = encode(picture(draw_pixels(1)))
DEEP = encode(picture(draw_pixels(1)).convert("L").convert("I;16"))
GREY = encode(picture(draw_pixels(1, channels=1)))
BAD = {
    r"bad.png -> it is damaged or cut short .*drop": bad_file(PNG[:-40]),
    r"bad.png -> it is damaged \(": bad_file(flipped(PNG, len(PNG) - 14)),
    r"b/bad.png -> it is no whole file of PNG, JPEG": bad_file(b"GIF89a"),
    r"bad.png -> it has more than 8 bits a channel": bad_file(DEEP),
    r"corpus.channels=null -> .* of 1 and of 3 ": bad_file(GREY),
    r"key k of .*a.tar -> its members cls, txt are not one image": shard(cls=b"1", txt=b"a"),
    r"its members jpg, png are not one image": shard(jpg=PNG, png=PNG),
    r"key k of .* -> it has no label that can be read": shard(png=PNG, cls=b"cat"),
    r"key k of .*its label is -1, and classes are": shard(png=PNG, cls=b"-1"),
    r"its label is 65536, and classes are": shard(png=PNG, cls=b"65536"),
    r"its label is 0.5, no number": shard(png=PNG, json=b'{"label": 0.5}'),
    r"1 of 2 images have no label": shard(png=PNG, cls=b"1"),
    r"key k of .*a.tar -> it is an array float64\[4\]": shard(npy=npy([1.0] * 4, "f8")),
    r"9 images, and .*labels-idx1-ubyte 8 labels": idx([0] * 8),
    r"images-idx3-ubyte -> it ends 3 bytes before": idx([0] * 9, cut=3),
    r"labels-idx1-ubyte -> it begins with 00000803": idx(np.zeros((9, 1, 1))),
    r"lone.png lies beside subfolders": subfolders("a", "b", lone=True),
    r"subfolders train, val look like splits": subfolders("train", "val"),
    r"0.png has no label, the first of 60": subfolders("a", labels_file={"labels": []}),
    r"dataset.json holds no list `labels`": subfolders("a", labels_file=[]),
    r"corpus.path has no class new": other_val,
    r"corpus.val_path=builtin:digits -> .*only one names its classes": unlike_val,
    r"corpus.test_path=builtin:digits -> .* has test images of its own": own_test,
    r"holds shards \(a.tar\) and images \(c.png\)": beside_shards,
    r"corpus.path=gone -> no such file or folder": settings(path="gone"),
    r"corpus.path=gone/\*.tar -> there is no shard": settings(path="gone/*.tar"),
    r"corpus.val_path=.* -> holds no image": lambda root: {
        "path": write_folder(root),
        "val_path": str(root.parent / "data"),
    },
    r"corpus.resize=nearest -> .* bilinear, bicubic": settings(resize="nearest"),
    r"corpus.resolution=0 -> ": settings(resolution=0),
    r"corpus.channels=4 -> .* 1, 3, None": settings(channels=4),
    r"corpus.jpeg_quality=0 -> .* 1 to 100": settings(jpeg_quality=0),
    r"corpus.shard_mb=0 -> ": settings(shard_mb=0),
    r"corpus.val_fraction=0.6, .* below 1": settings(val_fraction=0.6, test_fraction=0.4),
    r"corpus.val_fraction=1e-06, .* fell into val": settings(val_fraction=1e-6),
}


@pytest.mark.parametrize("message", BAD)
def test_errors_name_place_reason_and_remedy(message: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    given = BAD[message](tmp_path / "set")
    with pytest.raises(ValueError, match=rf"(?s){message}") as refused:
        make_images(**given).prepare(tmp_path / "data")
    assert str(refused.value).count(" -> ") >= 2


def test_image_of_too_many_pixels_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "b" / "vast.png").write_bytes(encode(picture(draw_pixels(0, 9, 8))))
    for limit in (65, 30):  # up to twice Pillow's limit, and beyond
        monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match=r"png -> it has too many pixels: .* pixels"):
            make_images(folder).prepare(tmp_path / "data")


def test_text_is_not_taken_for_images(
    make_corpus: Callable[..., Corpus], folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"corpus.path=.* -> holds no text"):
        make_corpus(folder).prepare(tmp_path / "data")
