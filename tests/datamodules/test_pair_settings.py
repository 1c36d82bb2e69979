import json
import random
from collections import Counter
from pathlib import Path

import pytest

from datamodules import pair_sources
from datamodules.inspection import inspect_data
from datamodules.tokenization import load_tokenizer
from tests.datamodules.pair_texts import (
    Pairs,
    make_pairs,
    make_texts,
    read_pairs,
    read_texts,
    write_parallel,
)


@pytest.fixture(autouse=True)
def _fine_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_sources, "_MARK_LINES", 8)


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return make_texts()


@pytest.fixture
def jsonl(pairs: Pairs, tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"de": s, "en": t}) + "\n" for s, t in pairs))
    return path


def test_empty_texts_are_named_or_dropped_and_counted(
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


def test_cleaning_removes_pairs_and_says_how_many(tmp_path: Path) -> None:
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
    is_joint: bool, tmp_path: Path
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


def test_sentinels_and_start_token_are_facts(jsonl: Path, tmp_path: Path) -> None:
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


def test_errors_name_key_value_and_remedy(pairs: Pairs, jsonl: Path, tmp_path: Path) -> None:
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
        r"corpus.train.sources=a -> there is no such key": {"train": {"sources": "a"}},
        r"corpus.train.path=gone.jsonl -> no such file": {"train": {"path": "gone.jsonl"}},
        r"corpus.train.path=.*all.de -> path is for records": {"train": {"path": whole["source"]}},
        r"corpus.target_key=fr -> .*choose one of de, en": {"target_key": "fr"},
        r"corpus.empty=skip -> .* raise or drop": {"empty": "skip"},
        r"corpus.max_length_ratio=0.5 -> .* from 1 on": {"max_length_ratio": 0.5},
        r"corpus.min_frequency=0 -> ": {"min_frequency": 0},
        r"corpus.num_sentinels=-1 -> ": {"num_sentinels": -1},
        r"two vocabularies of files": {"tokenizer": "x", "joint_vocabulary": False},
        r"corpus.min_frequency=2 -> .*char learns": {"tokenizer": "char", "min_frequency": 2},
        r"max_characters=1, .* -> removed all 200": {"max_characters": 1},
        r"corpus.val_fraction=1e-06, .* fell into val": {"val_fraction": 1e-6},
    }
    for message, settings in cases.items():
        with pytest.raises(ValueError, match=message):
            make_pairs(jsonl, **settings).prepare(tmp_path / "data")


def test_two_vocabularies_of_another_corpus_are_taken_over(pairs: Pairs, tmp_path: Path) -> None:
    files, two = write_parallel(tmp_path, list(pairs)), {"joint_vocabulary": False}
    first = make_pairs(train=files, tokenizer="word", **two).prepare(tmp_path / "data")
    paths = [first.path / name for name in ("tokenizer.json", "target_tokenizer.json")]
    given = {"tokenizer": str(paths[0]), "target_tokenizer": str(paths[1])}
    fewer = write_parallel(tmp_path / "fewer", list(pairs)[:100])
    second = make_pairs(train=fewer, **given, **two).prepare(tmp_path / "data")
    for path in paths:
        ours = load_tokenizer(second.path / path.name).get_vocab()
        assert ours == load_tokenizer(path).get_vocab()
    sizes = [first.facts[key] for key in ("vocab_size", "target_vocab_size")]
    own, other = (load_tokenizer(path).get_vocab() for path in paths)
    assert own != other
    assert [second.facts[key] for key in ("vocab_size", "target_vocab_size")] == sizes
