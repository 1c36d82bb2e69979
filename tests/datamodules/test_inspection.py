import io
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from datamodules import index as index_module
from datamodules.corpora import Corpus, PreparedData
from datamodules.foreign import index_shards
from datamodules.index import Index, read_index, write_index
from datamodules.inspection import inspect_data
from datamodules.write import ShardWriter


@pytest.fixture
def prepared(make_corpus: Callable[..., Corpus], jsonl: Path, tmp_path: Path) -> PreparedData:
    return make_corpus(jsonl, test_fraction=0.0).prepare(tmp_path)


def test_corpus_is_shown_by_split(
    prepared: PreparedData, documents: list[str], capsys: pytest.CaptureFixture
) -> None:
    inspect_data(str(prepared.path), 1)
    printed = capsys.readouterr().out
    for split in ("train", "val"):
        index = read_index(prepared.path / split)
        row = next(line for line in printed.splitlines() if line.startswith(f"│ {split}"))
        cells = [cell.strip() for cell in row.split("│")[1:-1]]
        lengths = sorted(index.lengths.tolist())
        middle = int(np.median(lengths))
        marks = f"{lengths[0]:,} to {lengths[-1]:,} tokens a sample, median {middle:,}\n"
        assert f"{split}: {marks}" in printed
        size = sum(file.stat().st_size for file in (prepared.path / split).glob("*.tar"))
        assert cells == [
            split,
            str(len(index.shards)),
            str(len(lengths)),
            str(prepared.facts["documents"][split]),
            f"{size:,}",
        ]
        assert f"{split}, sample 0: 000000" in printed
    assert "│ test" not in printed
    # Decoded text, not numbers: the first document of the split is there as it was written.
    assert any(repr(text[:12])[1:-1] in printed.split("train, sample 0")[1] for text in documents)


def test_members_are_described_and_shortened(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    array = np.zeros((2, 3), np.float16)
    with ShardWriter(tmp_path / "a.tar") as writer:
        for number in range(5):
            members = {
                "json": b'{"caption": "%d [bold]' % number + b"x" * 200 + b'"}',
                "jpg": b"\xff\xd8" * 700,
                "feature.npy": array,
                "txt": "naïve".encode() + b"\xff",
            }
            writer.write(1, members, key=f"key-{number}")
        facts = writer.finish()
    schema = {name: {"codec": name} for name in ("json", "jpg", "feature.npy", "txt")}
    schema["txt"]["optional"] = "true"
    write_index(tmp_path, schema=schema, tokenizer=None, shards=[facts])
    inspect_data(str(tmp_path), 1)
    printed = capsys.readouterr().out
    assert "json, jpg, feature.npy, txt (optional)" in printed
    for number in range(5):
        assert (f"sample {number}: key-{number}" in printed) == (number in (0, 2, 4))
    assert '{"caption": "2 [bold]xxx' in printed
    assert "x" * 100 not in printed
    assert "float16[2, 3]" in printed
    assert "jpg, 1,400 bytes\n" in printed
    assert "naïve\ufffd" in printed


@pytest.mark.parametrize("harm", ["shard", "table", "large table", "size", "missing"])
def test_bad_files_are_named(
    harm: str,
    make_dataset: Callable[..., Index],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_dataset(tmp_path / "corpus" / "train", [[300, 300, 300], [500, 200]])
    make_dataset(tmp_path / "corpus" / "val", [[300]])
    name = "checksums.u32" if "table" in harm else "train-000001.tar"
    content = bytearray((path := tmp_path / "corpus" / "train" / name).read_bytes())
    content[8] ^= 1
    path.write_bytes(content[:-1] if harm == "size" else content)
    if harm == "missing":
        path.unlink()
    if harm == "large table":  # which is not hashed when an index is read
        monkeypatch.setattr(index_module, "CHECKED_BYTES", 0)
    with pytest.raises(ValueError, match=rf"(?s)(?=.*{re.escape(name)}).* -> .* -> "):
        inspect_data(str(tmp_path / "corpus"), 1)


def test_compressed_shards_are_inspected_too(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar.gz", "w:gz") as tar:
            for name in "ab":
                entry = tarfile.TarInfo(f"{name}{number}.txt")
                entry.size = 5
                tar.addfile(entry, io.BytesIO(b"text" + name.encode()))
    index_shards(str(tmp_path), None, 1)
    inspect_data(str(tmp_path), 1)
    printed = capsys.readouterr().out
    for line in ("sample 0: a0", "sample 2: a1", "sample 3: b1", "txt, 5 bytes: 'textb'"):
        assert line in printed


def test_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no index.json"):
        inspect_data(str(tmp_path), 1)
