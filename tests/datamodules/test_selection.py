import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from datamodules.corpora import Corpus, PreparedData
from datamodules.index import read_index
from datamodules.reader import ShardReader
from datamodules.tokenization import load_tokenizer

ROOT = Path(__file__).parents[2]
NEAR = {"threshold": 0.6, "num_permutations": 64, "ngram": 2}
ALL = {
    "normalize": "NFC",
    "scrub_emails": "<email>",
    "min_characters": 30,
    "max_characters": 2500,
    "max_repeated_lines": 0.3,
    "max_repeated_ngrams": {2: 0.3, 5: 0.2},
    "exact_duplicates": True,
    "near_duplicates": NEAR,
}


def make_document(rng: random.Random) -> str:
    return " ".join(f"w{rng.randrange(5000)}" for _ in range(rng.randint(60, 120)))


@pytest.fixture(scope="module")
def dirty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of which each step finds some, repetitions far from each other."""
    rng = random.Random(0)
    texts = [make_document(rng) for _ in range(200)]
    texts[10:15] = [f"{text} cafe\u0301" for text in texts[10:15]]
    texts[20:25] = [f"{text} from a@b.org" for text in texts[20:25]]
    texts[150] = texts[20].replace("a@b.org", "other@mail.example")  # equal once scrubbed
    texts[151] = texts[10].replace("e\u0301", "é")  # equal once normalized
    texts[30:33] = ["short", "x" * 2501, "the same line\n" * 9]
    texts[40] = "again and again " * 40
    texts[160:180] = texts[60:80]
    for number in range(180, 190):  # similar to documents far before
        words = texts[number - 100].split()
        words[5] = "changed"
        texts[number] = " ".join(words)
    path = tmp_path_factory.mktemp("dirty") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def read_documents(prepared: PreparedData) -> list[list[str]]:
    """Documents of each split in order, decoded."""
    tokenizer, found = load_tokenizer(prepared.path / "tokenizer.json"), []
    for split, count in prepared.facts["documents"].items():
        index = read_index(prepared.path / split)
        reader, tokens = ShardReader(index), []
        for number in range(len(index.lengths)):
            region, dtype, offset, count_here = reader.array(number, "tokens.npy")
            tokens += np.frombuffer(reader.regions.view(region), dtype, count_here, offset).tolist()
        ends = [place for place, token in enumerate(tokens) if token == prepared.facts["end_token"]]
        starts = [0, *(end + 1 for end in ends)]
        found.append([tokenizer.decode(tokens[a:b]) for a, b in zip(starts, ends, strict=False)])
        assert len(found[-1]) == count
    return found


def test_each_step_reports_what_it_changed_and_removed(
    make_corpus: Callable[..., Corpus], dirty: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    prepared = make_corpus(dirty, clean=ALL).prepare(tmp_path)
    texts = [json.loads(line)["text"] for line in dirty.read_text().splitlines()]
    removed = {
        "min_characters": [30],
        "max_characters": [31],
        "max_repeated_lines": [32],
        "max_repeated_ngrams": [40],
        "exact_duplicates": [150, 151, *range(160, 180)],
        "near_duplicates": range(180, 190),
    }
    changed = {"normalize": range(10, 15), "scrub_emails": [*range(20, 25), 150]}
    gone = {number for numbers in removed.values() for number in numbers}
    numbers = {
        text.replace("a@b.org", "<email>").replace("e\u0301", "é"): number
        for number, text in enumerate(texts)
        if number not in gone
    }
    found = [[numbers.pop(text) for text in split] for split in read_documents(prepared)]
    assert not numbers
    assert all(split == sorted(split) for split in found)  # of equal ones the first has stayed
    for name, steps in {"changed": changed, "removed": removed}.items():
        counts = {step: facts["documents"] for step, facts in prepared.facts[name].items()}
        assert counts == {step: len(numbers) for step, numbers in steps.items()}
    sizes = {step: facts["bytes"] for step, facts in prepared.facts["removed"].items()}
    assert sizes["max_characters"] == 2501
    assert sizes["near_duplicates"] == sum(len(texts[n]) for n in removed["near_duplicates"])
    prepared.print_summary()
    printed = capsys.readouterr().out
    assert all(step in printed for step in ALL)


def test_steps_that_are_off_leave_data_and_digest_as_they_were(
    make_corpus: Callable[..., Corpus], dirty: Path, tmp_path: Path
) -> None:
    plain = make_corpus(dirty).prepare(tmp_path)
    assert make_corpus(dirty, clean=dict.fromkeys(ALL)).prepare(tmp_path) == plain
    assert "removed" not in plain.facts
    other = make_corpus(dirty, clean={"exact_duplicates": True}).prepare(tmp_path)
    assert other.path != plain.path
    assert list(other.facts["removed"]) == ["exact_duplicates"]
    assert make_corpus(dirty, clean={"min_characters": 9}).prepare(tmp_path).path != other.path


def test_bytes_do_not_depend_on_processes(
    make_corpus: Callable[..., Corpus], dirty: Path, tmp_path: Path
) -> None:
    settings = {"clean": ALL, "tokenizer": "bpe", "vocab_size": 300}
    one = make_corpus(dirty, num_processes=1, **settings).prepare(tmp_path / "one")
    three = make_corpus(dirty, num_processes=3, **settings).prepare(tmp_path / "three")
    assert one.facts["shards"]["train"] > 3
    assert contents(one.path) == contents(three.path)
    assert not list(tmp_path.rglob("*.tmp"))


KILLED = """
import json, os, signal, sys
from datamodules import selection
from datamodules.corpora import Corpus
from datamodules.write import ShardWriter

place, arguments, folder = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
write, finish, counts = selection.write_atomically, ShardWriter.finish, {"npz": 0, "shard": 0}

def count(what, last):
    counts[what] += 1
    if place == what and counts[what] == last:
        os.kill(os.getpid(), signal.SIGKILL)

def write_or_die(path, content):
    if path.suffix == ".npz":
        count("npz", 4)
    if place == path.name:
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, content)

def finish_or_die(*arguments):
    count("shard", 8)
    return finish(*arguments)

selection.write_atomically, ShardWriter.finish = write_or_die, finish_or_die
Corpus(**arguments).prepare(folder)
"""


@pytest.mark.parametrize("place", ["npz", "000002.verdicts.u8", "cleaning.json", "shard"])
def test_killed_preparation_is_finished_by_the_next(
    place: str, make_corpus: Callable[..., Corpus], dirty: Path, tmp_path: Path
) -> None:
    corpus = make_corpus(dirty, clean=ALL, tokenizer="bpe", vocab_size=280)
    command = [sys.executable, "-c", KILLED, place, json.dumps(corpus.__dict__), str(tmp_path)]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    units = next(tmp_path.glob("made-up-*")) / "units"
    scans = {file: file.stat().st_mtime_ns for file in units.glob("*.npz")}
    assert len(scans) == 3 if place == "npz" else len(scans) > 3
    assert (units / "cleaning.json").exists() == (place == "shard")
    if place != "shard":  # killed once more, before the verdicts are complete
        command[3] = "cleaning.json"
        again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert again.returncode == -signal.SIGKILL, again.stderr
        assert {file: file.stat().st_mtime_ns for file in scans} == scans
    prepared = corpus.prepare(tmp_path)
    assert contents(prepared.path) == contents(corpus.prepare(tmp_path / "undisturbed").path)


def test_tokenizer_is_trained_on_what_stays(
    make_corpus: Callable[..., Corpus], tmp_path: Path
) -> None:
    path = tmp_path / "texts.jsonl"
    texts = [*(f"kept words number {n}" for n in range(50)), *["zqzq " * 50] * 3, "e\u0301 kept"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    clean = {"max_characters": 100, "normalize": "NFC"}
    prepared = make_corpus(path, tokenizer="char", clean=clean).prepare(tmp_path / "data")
    vocabulary = load_tokenizer(prepared.path / "tokenizer.json").get_vocab()
    assert "é" in vocabulary
    assert not {"z", "q", "\u0301"} & vocabulary.keys()


def test_one_document_is_not_cleaned(make_corpus: Callable[..., Corpus], tmp_path: Path) -> None:
    (path := tmp_path / "text.txt").write_text("a text\n" * 100)
    with pytest.raises(ValueError, match=r"corpus.clean={'normalize': 'NFC'} -> .*one document"):
        make_corpus(path, clean={"normalize": "NFC"}).prepare(tmp_path / "data")


def test_corpus_of_which_nothing_stays_is_refused(
    make_corpus: Callable[..., Corpus], dirty: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"corpus.clean.* -> removed all 200 documents -> loosen"):
        make_corpus(dirty, clean={"min_characters": 10**6}).prepare(tmp_path)
