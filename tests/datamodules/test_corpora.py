import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from webdataset.compat import WebDataset

from datamodules import corpora
from datamodules.corpora import Corpus, PreparedData
from datamodules.index import read_index
from datamodules.reader import ShardReader
from datamodules.tokenization import load_tokenizer


def read_split(prepared: PreparedData, split: str) -> tuple[list[int], list[int]]:
    """Tokens of a split and the places of its end tokens."""
    index = read_index(prepared.path / split)
    reader = ShardReader(index)
    tokens: list[int] = []
    ends: list[int] = []
    for number, length in enumerate(index.lengths):
        arrays = {}
        for name in ("tokens.npy", "ends.npy"):
            region, dtype, offset, count = reader.array(number, name)
            arrays[name] = np.frombuffer(reader.regions.view(region), dtype, count, offset)
        ends += (arrays["ends.npy"] + len(tokens)).tolist()
        tokens += arrays["tokens.npy"].tolist()
        assert length == len(arrays["tokens.npy"])
    return tokens, ends


def read_documents(prepared: PreparedData) -> dict[str, list[str]]:
    """Documents of each split, decoded by the saved tokenizer."""
    tokenizer = load_tokenizer(prepared.path / "tokenizer.json")
    documents = {}
    for split in prepared.facts["shards"]:
        tokens, ends = read_split(prepared, split)
        assert [tokens[end] for end in ends] == [prepared.facts["end_token"]] * len(ends)
        starts = [0, *(end + 1 for end in ends)]
        assert starts.pop() == len(tokens)
        documents[split] = [
            tokenizer.decode(tokens[start:end]) for start, end in zip(starts, ends, strict=True)
        ]
    return documents


@pytest.fixture
def text_file(tmp_path: Path, documents: list[str]) -> Path:
    path = tmp_path / "all.txt"
    path.write_bytes("".join(documents).encode())
    return path


@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe", "existing"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_documents_survive_preparation(
    kind: str,
    tokenizer: str,
    make_corpus: Callable[..., Corpus],
    documents: list[str],
    jsonl: Path,
    tmp_path: Path,
) -> None:
    path = jsonl
    if kind == "parquet":
        path = tmp_path / "documents.parquet"
        parquet.write_table(pa.table({"text": [*documents, None]}), path, row_group_size=20)
    elif kind == "folder":
        (path := tmp_path / "texts" / "inner").mkdir(parents=True)
        for number, text in enumerate(documents):
            (path / f"{number:03d}.txt").write_bytes(text.encode())
        (path / "ignored.bin").write_bytes(b"\xff\xfe")
        (path / ".hidden").mkdir()
        (path / ".hidden" / "ignored.txt").write_bytes(b"\xff\xfe")
        path = path.parent
    settings = {"tokenizer": tokenizer, "vocab_size": 300 if tokenizer == "bpe" else None}
    if tokenizer == "existing":
        trained = make_corpus(jsonl, tokenizer="bpe", vocab_size=280).prepare(tmp_path / "trained")
        settings["tokenizer"] = str(trained.path / "tokenizer.json")
    prepared = make_corpus(path, **settings).prepare(tmp_path / "data")
    found = read_documents(prepared)
    assert sorted(sum(found.values(), start=[])) == sorted(documents)  # noqa: RUF017
    for split, texts in found.items():
        num_bytes, tokens = (
            sum(len(text.encode()) for text in texts),
            read_split(prepared, split)[0],
        )
        assert prepared.facts["documents"][split] == len(texts)
        assert prepared.facts["tokens"][split] == len(tokens)
        assert prepared.facts["bytes_per_token"][split] == num_bytes / len(tokens)
        assert len(tokens) > max(tokens) < prepared.facts["vocab_size"]


def test_sentinels_are_facts_and_only_their_number_changes_the_digest(
    make_corpus: Callable[..., Corpus], jsonl: Path, tmp_path: Path
) -> None:
    plain = make_corpus(jsonl).prepare(tmp_path)
    assert plain.facts["sentinels"] == []
    assert make_corpus(jsonl, num_sentinels=0).prepare(tmp_path) == plain
    assert "num_sentinels" not in plain.facts["settings"]
    some = make_corpus(jsonl, num_sentinels=4).prepare(tmp_path)
    assert some.path != plain.path
    assert some.facts["sentinels"] == [257, 258, 259, 260]
    assert some.facts["vocab_size"] == 261
    assert read_documents(some) == read_documents(plain)


def test_one_text_is_cut_contiguously_and_has_no_end_token(
    make_corpus: Callable[..., Corpus],
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    corpus = make_corpus(text_file, tokenizer="char", val_fraction=0.1, test_fraction=0.05)
    prepared = corpus.prepare(tmp_path)
    prepared.print_summary()
    assert f"{prepared.facts['tokens']['train']:,}" in capsys.readouterr().out
    text = text_file.read_bytes().decode()
    tokenizer = load_tokenizer(prepared.path / "tokenizer.json")
    parts = [read_split(prepared, split) for split in ("train", "val", "test")]
    assert prepared.facts["shards"]["train"] > 2
    assert prepared.facts["vocab_size"] == len(set(text))
    assert prepared.facts["end_token"] is None
    assert prepared.facts["documents"]["train"] == 1
    assert [tokenizer.decode(tokens) for tokens, _ in parts] == [
        tokenizer.decode(tokenizer.encode(text).ids[start:stop])
        for start, stop in zip(
            [0, len(parts[0][0]), len(text) - len(parts[2][0])],
            [len(parts[0][0]), len(text) - len(parts[2][0]), len(text)],
            strict=True,
        )
    ]
    assert all(not ends for _, ends in parts)
    size = text_file.stat().st_size
    assert abs(prepared.facts["bytes"]["train"] - 0.85 * size) < 4
    assert abs(prepared.facts["bytes"]["val"] - 0.1 * size) < 4


def test_plain_ascii_is_cut_where_nanogpt_cuts_it(
    make_corpus: Callable[..., Corpus], tmp_path: Path
) -> None:
    (tmp_path / "input.txt").write_text("".join(chr(97 + i % 26) for i in range(12_345)))
    prepared = make_corpus(tmp_path / "input.txt", test_fraction=0.0).prepare(tmp_path)
    assert prepared.facts["tokens"] == {"train": int(12_345 * 0.9), "val": 1235, "test": None}


def test_equal_documents_meet_in_one_split(
    make_corpus: Callable[..., Corpus], documents: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "twice.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents * 2))
    found = read_documents(make_corpus(path).prepare(tmp_path))
    assert len(found) == 3
    sets = [set(texts) for texts in found.values()]
    assert sum(map(len, sets)) == len(set(documents))
    other = read_documents(make_corpus(path, seed=1).prepare(tmp_path))
    assert set(other["val"]) != set(found["val"])


# webdataset leaves its last shard open, which is seen when the garbage is collected.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_stock_webdataset_reads_the_same_tokens(
    make_corpus: Callable[..., Corpus], jsonl: Path, tmp_path: Path
) -> None:
    prepared = make_corpus(jsonl).prepare(tmp_path)
    tokens, ends = read_split(prepared, "train")
    shards = [str(file) for file in sorted((prepared.path / "train").glob("*.tar"))]
    assert len(shards) > 2
    stream: Any = WebDataset(shards, shardshuffle=False).decode()
    theirs: list[int] = []
    their_ends: list[int] = []
    for sample in stream:
        their_ends += (sample["ends.npy"] + len(theirs)).tolist()
        theirs += sample["tokens.npy"].tolist()
    assert theirs == tokens
    assert their_ends == ends
    del stream
    gc.collect()


def test_preparing_again_finds_the_data_and_changed_text_is_prepared_anew(
    make_corpus: Callable[..., Corpus], jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_corpus(jsonl).prepare(tmp_path)
    with jsonl.open("a") as file:
        file.write('{"text": "one more"}\n')
    changed = make_corpus(jsonl).prepare(tmp_path)
    assert changed.path != first.path
    assert make_corpus(jsonl, chunk_kb=2).prepare(tmp_path).path not in (first.path, changed.path)
    monkeypatch.setattr(corpora, "encode_units", None)  # preparing again would fail
    monkeypatch.setattr("datamodules.sources.digest_file", None)  # and so would hashing again
    assert make_corpus(jsonl, num_processes=2).prepare(tmp_path) == changed


def test_standard_library_is_a_corpus_without_its_tests() -> None:
    files = corpora.list_files("builtin:stdlib", [".py"])
    names = {file.name for file in files}
    assert {"json/decoder.py", "heapq.py"} <= names
    assert not {"test", "tests", "encodings"} & {part for name in names for part in name.split("/")}
    assert 5e6 < sum(file.path.stat().st_size for file in files) < 30e6
    for file in files:
        file.path.read_bytes().decode()


def test_errors_name_key_value_and_remedy(
    make_corpus: Callable[..., Corpus], jsonl: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin.txt").write_bytes(b"abc\xe9def")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "number.jsonl").write_text('{"text": 1}\n')
    parquet.write_table(pa.table({"body": ["a"]}), tmp_path / "body.parquet")
    cases = {
        r"corpus.path=missing -> no such file": make_corpus("missing"),
        r"corpus.path=.*empty -> holds no text": make_corpus(tmp_path / "empty"),
        r"latin.txt -> byte 3 is not UTF-8": make_corpus(tmp_path / "latin.txt", tokenizer="char"),
        r"broken.jsonl -> the line at byte 14 is not": make_corpus(tmp_path / "broken.jsonl"),
        r"text_key=text -> holds int, not text": make_corpus(tmp_path / "number.jsonl"),
        r"text_key=text -> .*choose one of body": make_corpus(tmp_path / "body.parquet"),
        r"text_key=txt -> .*line at byte 0 .*of text": make_corpus(jsonl, text_key="txt"),
        r"corpus.tokenizer=bp -> neither byte, char": make_corpus(jsonl, tokenizer="bp"),
        r"corpus.tokenizer=.*latin.txt -> .*cannot read": make_corpus(
            jsonl, tokenizer=str(tmp_path / "latin.txt")
        ),
        r"corpus.vocab_size=256 -> .*at least 257": make_corpus(
            jsonl, tokenizer="bpe", vocab_size=256
        ),
        r"corpus.val_fraction=0.6, .*below 1": make_corpus(
            jsonl, val_fraction=0.6, test_fraction=0.5
        ),
        r"corpus.shard_mb=0 -> it is a number": make_corpus(jsonl, shard_mb=0),
        r"corpus.chunk_kb=0 -> it is a number": make_corpus(jsonl, chunk_kb=0),
        r"corpus.seed=-1 -> it is a number": make_corpus(jsonl, seed=-1),
        r"corpus.val_fraction=1e-06, .* -> nothing of .* fell into val": make_corpus(
            jsonl, val_fraction=1e-6
        ),
    }
    for message, corpus in cases.items():
        with pytest.raises(ValueError, match=message):
            corpus.prepare(tmp_path / "data")


def test_digests_stay_what_they_were(make_corpus: Callable[..., Corpus], tmp_path: Path) -> None:
    # Of data prepared before there were sentinels; another one would be prepared anew everywhere.
    (path := tmp_path / "documents.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    fractions = {"val_fraction": 0.0, "test_fraction": 0.0}
    corpus = make_corpus(path, tokenizer="bpe", vocab_size=258, **fractions)
    assert corpus.prepare(tmp_path).facts["digest"] == "dcca7f553fb2"
