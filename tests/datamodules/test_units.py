import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from datamodules.corpora import Corpus

ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_bytes_do_not_depend_on_processes(
    make_corpus: Callable[..., Corpus], jsonl: Path, tmp_path: Path
) -> None:
    settings = {"tokenizer": "bpe", "vocab_size": 300}
    one = make_corpus(jsonl, num_processes=1, **settings).prepare(tmp_path / "one")
    two = make_corpus(jsonl, num_processes=2, **settings).prepare(tmp_path / "two")
    assert one.facts["shards"]["train"] > 2
    assert contents(one.path) == contents(two.path)
    assert not list(tmp_path.rglob("*.tmp"))


KILLED = """
import json, os, signal, sys
from datamodules.corpora import Corpus
from datamodules.write import ShardWriter

finish, count = ShardWriter.finish, 0

def finish_or_die(self, text):
    global count
    count += 1
    if count == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return finish(self, text)

ShardWriter.finish = finish_or_die
Corpus(**json.loads(sys.argv[1])).prepare(sys.argv[2])
"""


def test_killed_preparation_is_finished_by_the_next(
    make_corpus: Callable[..., Corpus], jsonl: Path, tmp_path: Path
) -> None:
    corpus = make_corpus(jsonl)
    arguments = [json.dumps(corpus.__dict__), str(tmp_path / "killed")]
    command = [sys.executable, "-c", KILLED, *arguments]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = next((tmp_path / "killed").glob("made-up-*"))
    assert not (folder / "dataset.json").exists()
    assert list(folder.rglob("*.tmp"))
    finished = [
        folder / split / shard["facts"]["shard"]["url"]
        for unit in (folder / "units").glob("*.json")
        for split, shard in json.loads(unit.read_bytes()).items()
    ]
    assert len(finished) >= 4
    (damaged := finished.pop()).write_bytes(b"damaged meanwhile")
    number = damaged.stem.split("-")[1]
    times = {shard: shard.stat().st_mtime_ns for shard in finished if number not in shard.name}
    assert times
    prepared = corpus.prepare(tmp_path / "killed")
    assert {shard: shard.stat().st_mtime_ns for shard in times} == times
    assert contents(prepared.path) == contents(corpus.prepare(tmp_path / "undisturbed").path)


PREPARES = """
import json, sys
from datamodules.corpora import Corpus

facts = Corpus(**json.loads(sys.argv[1])).prepare(sys.argv[2]).facts
print("FACTS", json.dumps(facts))
"""


def test_processes_that_prepare_at_once_share_the_work(
    make_corpus: Callable[..., Corpus], jsonl: Path, tmp_path: Path
) -> None:
    arguments = [json.dumps(make_corpus(jsonl).__dict__), str(tmp_path / "data")]
    command = [sys.executable, "-c", PREPARES, *arguments]
    ranks = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    assert len({output.split("FACTS")[1] for output in outputs}) == 1
    assert sum("Preparing" in output for output in outputs) == 1


def test_error_of_a_process_reaches_the_caller(
    make_corpus: Callable[..., Corpus], jsonl: Path, tmp_path: Path
) -> None:
    with jsonl.open("a") as file:
        file.write("no json\n")
    with pytest.raises(ValueError, match="is not JSON"):
        make_corpus(jsonl, num_processes=2).prepare(tmp_path)
