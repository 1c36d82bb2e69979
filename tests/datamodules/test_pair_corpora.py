import gc
import gzip
import json
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from webdataset.compat import WebDataset

from datamodules import pair_sources
from datamodules.facts import PreparedData
from datamodules.index import digest_file, read_index
from datamodules.inspection import inspect_data
from datamodules.pair_corpora import PairCorpus
from datamodules.prepared import PreparedCorpus
from datamodules.reader import ShardReader
from datamodules.tokenization import load_tokenizer

ROOT = Path(__file__).parents[2]
SPLITS = ("train", "val", "test")
Pairs = list[tuple[str, str]]


@pytest.fixture(autouse=True)
def _fine_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_sources, "_MARK_LINES", 8)


@pytest.fixture
def make_pairs() -> Callable[..., PairCorpus]:
    def make(path: Path | None = None, **settings: Any) -> PairCorpus:
        defaults: dict[str, Any] = {
            "name": "pairs",
            "train": {"path": str(path)},
            "val": None,
            "test": None,
            "source_key": "de",
            "target_key": "en",
            "tokenizer": "byte",
            "joint_vocabulary": True,
            "vocab_size": None,
            "min_frequency": None,
            "lowercase": False,
            "num_sentinels": 0,
            "end_token": "<|endoftext|>",
            "start_token": None,
            "empty": "raise",
            "max_characters": None,
            "max_length_ratio": None,
            "unique": False,
            "val_fraction": 0.1,
            "test_fraction": 0.1,
            "chunk_kb": 1,
            "shard_mb": 1 / 128,
            "num_processes": 1,
            "seed": 0,
        }
        return PairCorpus(**{**defaults, **settings})

    return make


@pytest.fixture(scope="session")
def pairs() -> Pairs:
    """Pairs of unequal lengths, with what looks like the end of a line and is none."""
    rng = random.Random(0)
    words = [
        "Haus",
        "naïve",
        "日本",
        "🙂",
        "\u2028",
        "\x0b",
        "\x85",
        "\r.",
        "<|endoftext|>",
        "A.",
        "0",
    ]

    def text() -> str:
        return " ".join(rng.choices(words, k=rng.randint(1, 60))) + "x"

    return [(text(), text()) for _ in range(200)]


@pytest.fixture
def parallel(pairs: Pairs, tmp_path: Path) -> dict[str, str]:
    return write_parallel(tmp_path, pairs)


@pytest.fixture
def jsonl(pairs: Pairs, tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"de": s, "en": t}) + "\n" for s, t in pairs))
    return path


def write_parallel(folder: Path, pairs: Pairs, end: str = "\n") -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    paths = {"source": folder / "all.de", "target": folder / "all.en"}
    for side, path in enumerate(paths.values()):
        path.write_bytes("".join(pair[side] + end for pair in pairs).encode())
    return {name: str(path) for name, path in paths.items()}


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def read_pairs(prepared: PreparedData) -> dict[str, Pairs]:
    """Pairs of each split, decoded from the shards by the index alone, checked with the facts."""
    facts, found = prepared.facts, {}
    target = "tokenizer.json" if facts["is_joint"] else "target_tokenizer.json"
    assert (prepared.path / "target_tokenizer.json").exists() != facts["is_joint"]
    tokenizers = [load_tokenizer(prepared.path / name) for name in ("tokenizer.json", target)]
    end_tokens = [facts["end_token"], facts["target_end_token"]]
    for split in facts["shards"]:
        index = read_index(prepared.path / split)
        reader, tokens = ShardReader(index), []
        for number in range(len(index.lengths)):
            region, dtype, offset, count = reader.array(number, "tokens.npy")
            tokens += np.frombuffer(reader.regions.view(region), dtype, count, offset).tolist()
        assert all(shard.num_documents % 2 == 0 for shard in index.shards)
        texts, place = [], 0
        for number, length in enumerate(index.documents.tolist()):
            *ids, end = tokens[place : place + length]
            assert end == end_tokens[number % 2]
            texts.append(tokenizers[number % 2].decode(ids))
            place += length
        assert place == len(tokens) == facts["tokens"][split]
        found[split] = list(zip(texts[::2], texts[1::2], strict=True))
        lengths = index.documents.reshape(-1, 2).tolist()
        for side, name in enumerate(("source", "target")):
            assert facts[f"{name}_tokens"][split] == sum(pair[side] for pair in lengths)
            assert facts[f"longest_{name}"][split] == max(pair[side] for pair in lengths)
        assert facts["pairs"][split] == len(lengths)
    return found


def read_texts(prepared: PreparedData, split: str) -> Pairs:
    path = prepared.path / split / "texts.jsonl"
    assert prepared.facts["texts"][split] == digest_file(path)
    # Lines of any reader: also those that end one at U+2028.
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("kind", ["parallel", "jsonl", "gz", "parquet"])
def test_pairs_survive_preparation(
    kind: str,
    make_pairs: Callable[..., PairCorpus],
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
    make_pairs: Callable[..., PairCorpus],
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
    make_pairs: Callable[..., PairCorpus], pairs: Pairs, jsonl: Path, tmp_path: Path
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


def test_equal_sources_meet_in_one_split(
    make_pairs: Callable[..., PairCorpus], pairs: Pairs, tmp_path: Path
) -> None:
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
def test_stock_webdataset_reads_the_shards(
    make_pairs: Callable[..., PairCorpus], jsonl: Path, tmp_path: Path
) -> None:
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


def test_bytes_do_not_depend_on_processes(
    make_pairs: Callable[..., PairCorpus], parallel: dict[str, str], tmp_path: Path
) -> None:
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
    make_pairs: Callable[..., PairCorpus], parallel: dict[str, str], tmp_path: Path
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


def test_empty_texts_are_named_or_dropped_and_counted(
    make_pairs: Callable[..., PairCorpus],
    pairs: Pairs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    holes = list(pairs)
    holes[150], holes[70], holes[71] = (" ", "x"), ("y", ""), ("", "")
    files = write_parallel(tmp_path, holes)
    message = r"corpus.train: line 71 of .*all\.en is empty, the first of 3 pairs .*empty=drop"
    for _ in range(2):  # also where an earlier attempt has decided what to remove
        with pytest.raises(ValueError, match=message):
            make_pairs(train=files).prepare(tmp_path / "data")
    prepared = make_pairs(train=files, empty="drop").prepare(tmp_path / "data")
    kept = [pair for number, pair in enumerate(holes) if number not in (70, 71, 150)]
    assert sorted(sum(read_pairs(prepared).values(), [])) == sorted(kept)  # noqa: RUF017
    assert prepared.facts["removed"]["empty"]["documents"] == 3
    prepared.print_summary()
    printed = capsys.readouterr().out
    assert any("empty" in line and " 3 " in line for line in printed.splitlines())
    for name in ("pairs", "source_tokens", "target_tokens"):
        assert f"{prepared.facts[name]['train']:,}" in printed
    # Of records, the place of the record; of a split with files, that split.
    (tmp_path / "val.jsonl").write_text('{"de": "a", "en": "b"}\n\n{"de": "a", "en": null}\n')
    with pytest.raises(ValueError, match=r"corpus.val: record 2 from byte 0 on of .*val.jsonl"):
        make_pairs(
            train=write_parallel(tmp_path / "whole", pairs),
            val={"path": str(tmp_path / "val.jsonl")},
        ).prepare(tmp_path / "other")


def test_cleaning_removes_pairs_and_says_how_many(
    make_pairs: Callable[..., PairCorpus], tmp_path: Path
) -> None:
    plain = [(f"quelle {n}", f"target {n}") for n in range(100)]
    dirty = [
        *(("kurz", "k" * 41), ("k" * 41, "kurz"), ("l" * 101, "l" * 101)),
        *(("Quelle 3", "Target 3"), ("kurz", "k" * 40), ("quelle 4", "another")),
    ]
    files = write_parallel(tmp_path, plain + dirty)
    settings = {"unique": True, "max_characters": 100, "max_length_ratio": 10, "lowercase": True}
    prepared = make_pairs(train=files, **settings).prepare(tmp_path)
    found = read_pairs(prepared)
    assert sorted(sum(found.values(), [])) == sorted(plain + dirty[4:])  # noqa: RUF017
    counts = {step: n["documents"] for step, n in prepared.facts["removed"].items()}
    steps = {"empty": 0, "max_characters": 1, "max_length_ratio": 2, "exact_duplicates": 1}
    assert counts == steps
    assert prepared.facts["changed"]["lowercase"]["documents"] == 1
    cased = make_pairs(train=files, **settings | {"lowercase": False}).prepare(tmp_path)
    assert cased.facts["removed"]["exact_duplicates"]["documents"] == 0


@pytest.mark.parametrize("is_joint", [True, False])
def test_word_vocabulary_holds_the_frequent_words_of_its_side(
    is_joint: bool, make_pairs: Callable[..., PairCorpus], tmp_path: Path
) -> None:
    rng = random.Random(1)
    sides = [[f"{side}{n}" for n in range(30)] + ["Und", "."] for side in "st"]
    weights = [1 / (n + 1) for n in range(32)]
    pairs = [tuple(" ".join(rng.choices(w, weights, k=9)) for w in sides) for _ in range(60)]
    files = write_parallel(tmp_path, pairs)
    settings = {"tokenizer": "word", "lowercase": True, "joint_vocabulary": is_joint}
    prepared = make_pairs(train=files, min_frequency=6, **settings).prepare(tmp_path)
    texts = [read_texts(prepared, split) for split in ("val", "test")]
    assert all(text == text.lower() for pairs in texts for pair in pairs for text in pair)
    held_out = {pair for pairs in texts for pair in pairs}
    lower = [tuple(text.lower() for text in pair) for pair in pairs]
    counts = [Counter(w for p in lower if p not in held_out for w in p[s].split()) for s in (0, 1)]
    assert any(0 < count < 6 for count in counts[0].values())
    if is_joint:
        counts = [counts[0] + counts[1]]
    names = ["tokenizer.json", "target_tokenizer.json"][: len(counts)]
    for name, expected in zip(names, counts, strict=True):
        vocabulary = load_tokenizer(prepared.path / name).get_vocab()
        words = {word for word, count in expected.items() if count >= 6}
        assert set(vocabulary) == {"<|unknown|>", "<|endoftext|>", *words}
    sizes = [prepared.facts["vocab_size"], prepared.facts["target_vocab_size"]]
    assert sizes == [sum(n >= 6 for n in side.values()) + 2 for side in (counts * 2)[:2]]
    decoded = read_pairs(prepared)["val"]  # rare words are unknown, of the others nothing is lost
    for pair, written in zip(decoded, texts[0], strict=True):
        for side in (0, 1):
            known = (counts * 2)[side]
            words = [w if known[w] >= 6 else "<|unknown|>" for w in written[side].split()]
            assert pair[side] == " ".join(words)


def test_sentinels_and_start_token_are_facts(
    make_pairs: Callable[..., PairCorpus], jsonl: Path, tmp_path: Path
) -> None:
    plain = make_pairs(jsonl).prepare(tmp_path).facts
    assert (plain["sentinels"], plain["start_token"], plain["end_token"]) == ([], 256, 256)
    settings = {"num_sentinels": 2, "start_token": "<pad>"}
    prepared = make_pairs(jsonl, **settings).prepare(tmp_path)
    assert prepared.facts["start_token"] == 257
    assert prepared.facts["sentinels"] == [258, 259]
    assert prepared.facts["vocab_size"] == 260
    existing = str(prepared.path / "tokenizer.json")
    again = make_pairs(jsonl, tokenizer=existing, start_token="<pad>").prepare(tmp_path)
    keys = ("vocab_size", "end_token", "start_token", "sentinels", "tokens")
    assert [again.facts[key] for key in keys] == [prepared.facts[key] for key in keys]


def test_functions_of_the_standard_library_are_pairs(
    make_pairs: Callable[..., PairCorpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [f for f in pair_sources.list_files("builtin:stdlib", [".py"]) if f.name[0] in "hj"]
    monkeypatch.setattr(pair_sources, "list_files", lambda path, suffixes: files)
    assert {"heapq.py", "json/decoder.py"} <= {file.name for file in files}
    prepared = make_pairs(
        train={"path": "builtin:stdlib_summaries"}, shard_mb=1 / 8, max_characters=2000
    ).prepare(tmp_path)
    found = sum(read_pairs(prepared).values(), [])  # noqa: RUF017
    pushes = {source: target for source, target in found if source.startswith("def heappush(")}
    ((source, target),) = pushes.items()
    assert target == "Push item onto heap, maintaining the heap invariant."
    assert source == (
        "def heappush(heap, item):\n    heap.append(item)\n    _siftdown(heap, 0, len(heap)-1)"
    )
    assert len(found) > 50
    assert all(len(source) <= 2000 for source, _ in found)


def test_prepared_pairs_are_inspected(
    make_pairs: Callable[..., PairCorpus],
    jsonl: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = {"joint_vocabulary": False, "tokenizer": "bpe", "vocab_size": 300}
    prepared = make_pairs(jsonl, **settings).prepare(tmp_path)
    found = read_pairs(prepared)
    inspect_data(str(prepared.path), 1)
    printed = capsys.readouterr().out
    for split, pairs in found.items():
        for number in (0, len(pairs) // 2, len(pairs) - 1):
            shown = printed.split(f"{split}, pair {number}\n")[1].splitlines()
            for line, name, text in zip(shown, ("source", "target"), pairs[number], strict=False):
                assert line.startswith(f"  {name}, ")
                assert repr(text)[:40] in line
    (prepared.path / "val" / "texts.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 of \d+ files .*val/texts.jsonl"):
        inspect_data(str(prepared.path), 1)


def test_pairs_from_afar_come_with_all_their_small_files(
    make_pairs: Callable[..., PairCorpus], jsonl: Path, tmp_path: Path
) -> None:
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


def test_errors_name_key_value_and_remedy(
    make_pairs: Callable[..., PairCorpus], pairs: Pairs, jsonl: Path, tmp_path: Path
) -> None:
    whole = write_parallel(tmp_path / "whole", pairs)
    short = write_parallel(tmp_path / "short", pairs[:-1])
    latin = write_parallel(tmp_path / "latin", pairs)
    content = Path(latin["target"]).read_bytes()
    line = content.index(b"\n", 9000) + 1
    Path(latin["target"]).write_bytes(content[:line] + b"\xe9" + content[line:])
    for name in ("empty.de", "empty.en"):
        (tmp_path / name).write_bytes(b"")
    nothing = {"source": str(tmp_path / "empty.de"), "target": str(tmp_path / "empty.en")}
    uneven = {"source": whole["source"], "target": short["target"]}
    cases = {
        r"source=.*whole/all.de, target=.*short/all.en -> they have 200 and 199 ": {
            "train": uneven
        },
        rf"latin/all.en -> byte {line} is not UTF-8": {"train": latin},
        r"empty.de -> holds no pairs": {"train": nothing},
        r"corpus.train={} -> .* give source and target": {"train": {"path": None}},
        r"corpus.val={'source': .*} -> .* give source and": {"val": {"source": whole["source"]}},
        r"corpus.train.sourc=a -> there is no such key": {"train": {"sourc": "a"}},
        r"corpus.train.path=gone.jsonl -> no such file": {"train": {"path": "gone.jsonl"}},
        r"corpus.train.path=.*all.de -> path is for records": {"train": {"path": whole["source"]}},
        r"corpus.target_key=fr -> .*choose one of de, en": {"target_key": "fr"},
        r"corpus.empty=skip -> .* raise or drop": {"empty": "skip"},
        r"corpus.max_length_ratio=0.5 -> .* from 1 on": {"max_length_ratio": 0.5},
        r"corpus.min_frequency=0 -> ": {"min_frequency": 0},
        r"corpus.num_sentinels=-1 -> ": {"num_sentinels": -1},
        r"joint_vocabulary=false -> one file": {"tokenizer": "x", "joint_vocabulary": False},
        r"max_characters=1, .* -> removed all 200": {"max_characters": 1},
        r"corpus.val_fraction=1e-06, .* fell into val": {"val_fraction": 1e-6},
    }
    for message, settings in cases.items():
        with pytest.raises(ValueError, match=message):
            make_pairs(jsonl, **settings).prepare(tmp_path / "data")
