import gc
import gzip
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from pyarrow import parquet
from webdataset.compat import WebDataset

from datamodules import pair_sources
from datamodules.prepared import PreparedCorpus
from datamodules.tokenization import load_tokenizer
from tests.datamodules.pair_texts import (
    Pairs,
    contents,
    make_pairs,
    make_texts,
    read_pairs,
    read_texts,
    write_parallel,
)

ROOT = Path(__file__).parents[2]
SPLITS = ("train", "val", "test")


@pytest.fixture(autouse=True)
def _fine_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_sources, "_MARK_LINES", 8)


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return make_texts()


@pytest.fixture
def parallel(pairs: Pairs, tmp_path: Path) -> dict[str, str]:
    return write_parallel(tmp_path, pairs)


@pytest.fixture
def jsonl(pairs: Pairs, tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"de": s, "en": t}) + "\n" for s, t in pairs))
    return path


@pytest.mark.parametrize("kind", ["parallel", "jsonl", "gz", "parquet"])
def test_pairs_survive_preparation(
    kind: str,
    pairs: Pairs,
    parallel: dict[str, str],
    jsonl: Path,
    tmp_path: Path,
) -> None:
    files = {"path": str(jsonl)}
    if kind == "parallel":
        files = parallel
    elif kind == "gz":
        files = {"path": str(tmp_path / "pairs.jsonl.gz")}
        Path(files["path"]).write_bytes(gzip.compress(jsonl.read_bytes()))
    elif kind == "parquet":
        files = {"path": str(tmp_path / "pairs.parquet")}
        table = pa.table({"en": [t for _, t in pairs], "de": [s for s, _ in pairs]})
        parquet.write_table(table, files["path"], row_group_size=20)
    prepared = make_pairs(train=files).prepare(tmp_path / "data")
    found = read_pairs(prepared)
    assert list(found) == list(SPLITS)
    assert sorted(sum(found.values(), [])) == sorted(pairs)  # noqa: RUF017
    order = {pair: number for number, pair in enumerate(pairs)}
    for split, texts in found.items():
        assert [order[pair] for pair in texts] == sorted(order[pair] for pair in texts)
        num_bytes = sum(len(target.encode()) for _, target in texts)
        per_token = num_bytes / prepared.facts["target_tokens"][split]
        assert prepared.facts["bytes_per_token"][split] == per_token
        if split != "train":
            assert read_texts(prepared, split) == texts
    assert not (prepared.path / "train" / "texts.jsonl").exists()
    # A shard a unit of both texts, so neither one alone nor one for each piece of either side.
    if kind in ("parallel", "jsonl"):
        total = sum(len((s + t).encode()) for s, t in pairs)
        assert (
            0.8 * total * 128 / 2**20 < prepared.facts["shards"]["train"] < 2 * total * 128 / 2**20
        )


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("is_last_line_open", [False, True])
def test_lines_end_with_newlines_alone(
    end: str,
    is_last_line_open: bool,
    pairs: Pairs,
    tmp_path: Path,
) -> None:
    for number in (1, 16, 200):  # below, at and beyond the marks at which files are cut
        files = write_parallel(tmp_path / str(number), pairs[:number], end)
        path = Path(files["source"])
        content = b"\xef\xbb\xbf" + path.read_bytes()
        path.write_bytes(content.removesuffix(end.encode()) if is_last_line_open else content)
        fractions = {"val_fraction": 0.0, "test_fraction": 0.0}
        prepared = make_pairs(train=files, **fractions).prepare(tmp_path)
        assert read_pairs(prepared) == {"train": pairs[:number]}
        assert prepared.facts["texts"] == {"val": None, "test": None}


def test_splits_with_files_of_their_own_are_taken_as_they_are(
    pairs: Pairs, jsonl: Path, tmp_path: Path
) -> None:
    val = [("kurz", "short"), ("kurz", "short"), ("a" * 999, "b")]
    settings = {"val": write_parallel(tmp_path / "val", val), "test": None, "unique": True}
    bounds = {"max_characters": 900, "max_length_ratio": 500.0}
    prepared = make_pairs(jsonl, **settings, **bounds).prepare(tmp_path / "data")
    found = read_pairs(prepared)
    assert found["val"] == val == read_texts(prepared, "val")
    assert sorted(found["train"] + found["test"]) == sorted(pairs)
    # A share that plays no part makes no other data.
    same = make_pairs(jsonl, **settings, **bounds, val_fraction=0.3).prepare(tmp_path / "data")
    assert same == prepared
    other = make_pairs(jsonl, **settings, **bounds, test_fraction=0.3).prepare(tmp_path / "data")
    assert len(read_pairs(other)["test"]) > len(found["test"])


def test_equal_sources_meet_in_one_split(pairs: Pairs, tmp_path: Path) -> None:
    twice = pairs + [(source, f"{target} again") for source, target in pairs]
    files = write_parallel(tmp_path, twice)
    found = read_pairs(make_pairs(train=files).prepare(tmp_path))
    sources = [{source for source, _ in found[split]} for split in SPLITS]
    assert sum(map(len, sources)) == len({source for source, _ in pairs})
    other = read_pairs(make_pairs(train=files, seed=1).prepare(tmp_path))
    assert {source for source, _ in other["val"]} != sources[1]


# webdataset leaves its last shard open, which is seen when the garbage is collected.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_stock_webdataset_reads_the_shards(jsonl: Path, tmp_path: Path) -> None:
    prepared = make_pairs(jsonl).prepare(tmp_path)
    tokenizer = load_tokenizer(prepared.path / "tokenizer.json")
    shards = [str(file) for file in sorted((prepared.path / "train").glob("*.tar"))]
    assert len(shards) > 2
    tokens: list[int] = []
    ends: list[int] = []
    stream: Any = WebDataset(shards, shardshuffle=False).decode()
    for sample in stream:
        ends += (sample["ends.npy"] + len(tokens)).tolist()
        tokens += sample["tokens.npy"].tolist()
    starts = [0, *(end + 1 for end in ends)]
    texts = [tokenizer.decode(tokens[a:b]) for a, b in zip(starts, ends, strict=False)]
    assert list(zip(texts[::2], texts[1::2], strict=True)) == read_pairs(prepared)["train"]
    del stream
    gc.collect()


def test_bytes_do_not_depend_on_processes(parallel: dict[str, str], tmp_path: Path) -> None:
    settings = {"train": parallel, "tokenizer": "bpe", "vocab_size": 300, "unique": True}
    one = make_pairs(num_processes=1, **settings).prepare(tmp_path / "one")
    two = make_pairs(num_processes=2, **settings).prepare(tmp_path / "two")
    assert one.facts["shards"]["train"] > 2
    assert contents(one.path) == contents(two.path)
    assert not list(tmp_path.rglob("*.tmp"))


KILLED = """
import json, os, signal, sys
from datamodules import pair_sources
from datamodules.pair_corpora import PairCorpus
from datamodules.write import ShardWriter

finish, count = ShardWriter.finish, 0

def finish_or_die(self, text):
    global count
    count += 1
    if count == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return finish(self, text)

ShardWriter.finish = finish_or_die
pair_sources._MARK_LINES = 8
PairCorpus(**json.loads(sys.argv[1])).prepare(sys.argv[2])
"""


def test_killed_preparation_is_finished_by_the_next(
    parallel: dict[str, str], tmp_path: Path
) -> None:
    corpus = make_pairs(train=parallel)
    arguments = [json.dumps(corpus.__dict__), str(tmp_path / "killed")]
    command = [sys.executable, "-c", KILLED, *arguments]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = next((tmp_path / "killed").glob("pairs-*"))
    assert not (folder / "dataset.json").exists()
    finished = sorted((folder / "units" / "train").glob("[0-9]*[0-9].json"))
    assert len(finished) >= 2
    finished[1].with_suffix(".val.jsonl").write_bytes(b"damaged meanwhile")
    times = [file.stat().st_mtime_ns for file in (folder / "train").glob("*-000000.tar")]
    prepared = corpus.prepare(tmp_path / "killed")
    assert times
    assert times == [file.stat().st_mtime_ns for file in (folder / "train").glob("*-000000.tar")]
    assert contents(prepared.path) == contents(corpus.prepare(tmp_path / "undisturbed").path)


def test_pairs_from_afar_come_with_all_their_small_files(jsonl: Path, tmp_path: Path) -> None:
    prepared = make_pairs(jsonl, joint_vocabulary=False).prepare(tmp_path / "data")
    store = fsspec.filesystem("memory")
    store.put(str(prepared.path), "/far", recursive=True)
    there = PreparedCorpus(name="copy", path="memory://far", storage_options={})
    copy = there.prepare(tmp_path / "copies")
    here = contents(copy.path)
    assert "target_tokenizer.json" in here
    for name, content in contents(prepared.path).items():
        assert name.endswith(".tar") or here[name] == content
    store.pipe("/far/val/texts.jsonl", b"[]\n")
    with pytest.raises(ValueError, match=r"val/texts.jsonl is not the file"):
        there.prepare(tmp_path / "others")
