import gzip
import json
import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import zstandard

from datamodules.lines import read_lines
from datamodules.sources import list_files, plan_units, read_documents

OPENERS = {"gz": gzip.open, "zst": zstandard.open}


def read_all(path: Path) -> list[str]:
    ((piece,),) = plan_units(list_files(str(path), []), 100, None)  # one, whatever its size
    return list(read_documents(piece, "text"))


def members(kind: str, lines: list[str], num_members: int) -> bytes:
    """Compress lines as several gzip members or zstd frames, one after the other."""
    compress = {"gz": gzip.compress, "zst": zstandard.compress}[kind]
    size = -(-len(lines) // num_members)
    parts = [lines[start : start + size] for start in range(0, len(lines), size)]
    # A member may end inside of a line.
    texts = "".join(lines).encode()
    cuts = [0, *(len("".join(lines[: size * n])) - 3 for n in range(1, len(parts))), len(texts)]
    return b"".join(compress(texts[start:stop]) for start, stop in pairwise(cuts))


@pytest.mark.parametrize("num_members", [1, 3])
@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_compressed_records_are_those_of_the_plain_file(
    kind: str, num_members: int, documents: list[str], tmp_path: Path
) -> None:
    lines = [json.dumps({"text": text}) + "\n" for text in documents]
    (path := tmp_path / f"texts.v1.jsonl.{kind}").write_bytes(members(kind, lines, num_members))
    assert read_all(path) == documents
    offsets = [offset for offset, _ in read_lines(path, 0, 1)]
    assert offsets == [sum(map(len, lines[:n])) for n in range(len(lines))]


ROOT = Path(__file__).parents[2]
READS = """
import sys, tracemalloc
from pathlib import Path
from datamodules.lines import read_lines

tracemalloc.start()
read = sum(len(line) for _, line in read_lines(Path(sys.argv[1]), 0, 1))
print(read, tracemalloc.get_traced_memory()[1])
"""


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_compressed_files_are_streamed(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"large.jsonl.{kind}"
    with OPENERS[kind](path, "wb") as file:
        for seed in range(32):
            text = random.Random(seed).randbytes(2**18).hex()
            file.write(json.dumps({"text": text}).encode() + b"\n")
    # In a process of its own, where no thread of another test allocates.
    command = [sys.executable, "-c", READS, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    read, peak = map(int, done.stdout.split())
    assert read > 2**24
    assert peak < 2**23


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("harm", ["cut short", "not compressed", "damaged inside", "empty frame"])
def test_damaged_archives_are_named(
    kind: str, harm: str, documents: list[str], tmp_path: Path
) -> None:
    lines = [json.dumps({"text": text}) + "\n" for text in documents]
    content = bytearray(members(kind, lines, 1))
    if harm == "cut short":
        del content[-4:]
    elif harm == "not compressed":
        content = bytearray("".join(lines).encode())
    elif harm == "damaged inside":
        content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    else:
        content += content[:6]
    (path := tmp_path / f"bad.jsonl.{kind}").write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad.jsonl.{kind} -> cannot be .* -> .*fetch it again"):
        read_all(path)


def test_compressed_files_of_a_folder_count_by_both_suffixes(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.jsonl.zst", "c.json.gz", "d.jsonl", "e.gz"):
        (tmp_path / name).write_bytes(b"x")
    names = [file.name for file in list_files(str(tmp_path), [".jsonl.gz", ".jsonl.zst"])]
    assert names == ["a.jsonl.gz", "b.jsonl.zst"]


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path := tmp_path / "texts.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "a"}\n'))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match=r"texts.jsonl.zst -> .* zstandard, .* -> pip install"):
        read_all(path)


def test_half_a_surrogate_pair_is_named(tmp_path: Path) -> None:
    (path := tmp_path / "texts.jsonl").write_text('{"text": "a"}\n{"text": "b\\ud83d"}\n')
    pieces = plan_units(list_files(str(path), []), 100, None)[0]
    with pytest.raises(ValueError, match=r"character 1 is half .*texts.jsonl, line at byte 14 ->"):
        list(read_documents(pieces[0], "text"))


def test_damaged_parquet_and_links_to_nothing_are_named(tmp_path: Path) -> None:
    (path := tmp_path / "texts.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"corpus.path: .*texts.parquet -> is no Parquet file"):
        read_all(path)
    (tmp_path / "lost.txt").symlink_to(tmp_path / "moved.txt")
    with pytest.raises(ValueError, match=r"corpus.path=.* -> .*lost.txt is a link to nothing ->"):
        list_files(str(tmp_path), [".txt"])
