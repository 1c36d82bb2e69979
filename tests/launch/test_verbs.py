"""The other verbs, on the checkpoints of small runs."""

import gzip
import io
import json
import re
import subprocess
import sys
import tarfile

import pytest
from tokenizers import Tokenizer

from launch.evaluate import evaluate_run
from launch.generate import generate
from launch.prepare import prepare


@pytest.fixture
def run(small_run, train):
    return train(*small_run)


def test_evaluate_repeats_the_validation_of_the_run(run, compose, capfd):
    overrides = [f"run={run.path}", "accelerator=cpu", "checkpoint=last"]
    evaluate_run(compose("evaluate", overrides))
    assert "val/bits_per_byte" in capfd.readouterr().out
    found = json.loads((run.path / "evaluations/val-step-00000020.json").read_text())
    assert found["val/loss"] == pytest.approx(run.summary["val/loss"], abs=1e-6)
    evaluate_run(compose("evaluate", [*overrides, "split=test"]))
    found = json.loads((run.path / "evaluations/test-step-00000020.json").read_text())
    assert found["test/loss"] != pytest.approx(run.summary["val/loss"], abs=1e-6)
    with pytest.raises(ValueError, match="num_beams=4 -> GPT generates no answers"):
        evaluate_run(compose("evaluate", [*overrides, "num_beams=4"]))


def test_evaluate_refuses_another_corpus(run, compose, text_file):
    text = text_file.read_text()
    try:
        text_file.write_text(text.replace("dog", "cat"))
        with pytest.raises(ValueError, match=r"its corpus has changed .*-> restore"):
            evaluate_run(compose("evaluate", [f"run={run.path}", "accelerator=cpu"]))
    finally:
        text_file.write_text(text)


def test_generate_prints_continuations_of_the_prompts(run, compose, capfd, tmp_path):
    overrides = [f"run={run.path}", "accelerator=cpu", "max_new_tokens=6", "num_sequences=2"]
    capfd.readouterr()
    generate(compose("generate", [*overrides, "prompt=the dog"]))
    first = capfd.readouterr().out
    texts = first.split("-" * 40 + "\n")[:2]
    assert all(text.startswith("the dog") for text in texts)
    assert [len(text.removesuffix("\n")) for text in texts] == [13, 13]
    generate(compose("generate", [*overrides, "prompt=the dog"]))
    assert capfd.readouterr().out == first  # the same seed
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\nthe tree\n")
    generate(compose("generate", [*overrides, f"prompt_file={prompts}"]))
    assert capfd.readouterr().out.count("the tree") == 2


def test_generate_refuses_an_unknown_run(compose):
    overrides = ["run=nobody"]
    with pytest.raises(ValueError, match=r"run=nobody -> no such run"):
        generate(compose("generate", overrides))


def test_prepare_prints_what_is_there(text_file, tmp_path, compose, capfd):
    overrides = ["corpus=text", f"corpus.path={text_file}", f"data_dir={tmp_path}"]
    prepare(compose("prepare", [*overrides, "corpus.vocab_size=300"]))
    assert str(tmp_path) in capfd.readouterr().out
    (tokenizer,) = tmp_path.glob("*/tokenizer.json")
    assert Tokenizer.from_file(str(tokenizer)).get_vocab_size() <= 300


def test_prepare_cleans_and_prints_what_it_removed(tmp_path, compose, capfd):
    texts = [f"document number {n} says what no other says" for n in range(40)]
    texts += [texts[0], "line that repeats\n" * 20]
    path = tmp_path / "texts.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    overrides = ["corpus=text", f"corpus.path={path}", f"data_dir={tmp_path}"]
    overrides += ["corpus.tokenizer=byte", "corpus.val_fraction=0.2", "corpus.test_fraction=0"]
    options = ["corpus/clean=gopher", "corpus.clean.near_duplicates.ngram=2"]
    prepare(compose("prepare", [*overrides, *options]))
    printed = capfd.readouterr().out
    assert re.search(r"exact_duplicates\W+removed\W+1\b", printed)
    assert re.search(r"max_repeated_lines\W+removed\W+1\b", printed)
    with pytest.raises(ValueError, match=r"corpus.clean.normalize=nfc -> "):
        prepare(compose("prepare", [*overrides, "corpus.clean.normalize=nfc"]))


def test_prepare_indexes_foreign_shards_and_inspects_them(command, compose, capfd, tmp_path):
    for number in range(3):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for name, text in {
                "a.txt": "a caption " * 20,
                "a.json": '{"x": 1}',
                "b.txt": "b",
            }.items():
                entry = tarfile.TarInfo(f"{number}/{name}")
                entry.size = len(text)
                tar.addfile(entry, io.BytesIO(text.encode()))
    prepare(compose("prepare", [f"index={tmp_path}", "num_processes=1"]))
    assert "json (optional), txt" in capfd.readouterr().out
    shards = ",".join(f"{tmp_path}/{number}.tar" for number in (2, 0))
    prepare(compose("prepare", [f"index=[{shards}]", f"out={tmp_path}/two", "num_processes=1"]))
    assert f"path: {tmp_path}/two" in capfd.readouterr().out
    with pytest.raises(ValueError, match=r"out=x -> out belongs to index"):
        prepare(compose("prepare", [f"inspect={tmp_path}", "out=x"]))
    inspect = [f"inspect={tmp_path}/two", "num_processes=1"]
    prepare(compose("prepare", inspect))
    assert "'a caption a caption" in capfd.readouterr().out
    content = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(content[:-1] + b"x")
    done = subprocess.run(command("prepare", *inspect), capture_output=True, text=True)
    assert done.returncode == 1
    assert f"1 of 6 files are not those that the index was written with: {tmp_path}/0.tar" in (
        done.stderr
    )


def test_wandb_continues_under_one_id(small_run, train, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    logged = []
    import wandb

    started = wandb.init

    def init(**settings):
        client = started(**settings)
        log = client.log
        client.log = lambda row, step: (logged.append((step, row)), log(row, step=step))
        return client

    monkeypatch.setattr(wandb, "init", init)
    options = ["logger=wandb", "logger.mode=offline"]
    train(*small_run, *options, "max_steps=10")
    first = [step for step, row in logged if "train/loss" in row]
    run = train(*small_run, *options, "resume.extend=true")
    steps = [step for step, row in logged if "train/loss" in row]
    assert first == list(range(1, 11))
    assert steps == [*first, *first, *range(11, 21)]  # the second client is given all rows
    assert all(row["samples"] == 8 * step for step, row in logged)
    assert any("samples" in row and hasattr(row.get("samples_table"), "data") for _, row in logged)
    run_id = json.loads((run.path / "wandb.json").read_text())["id"]
    directories = list((run.path / "wandb").glob("offline-run-*"))
    assert len(directories) == 2
    assert all(path.name.endswith(run_id) for path in directories)


def test_without_a_logger_wandb_is_not_imported(small_run, command):
    code = (
        "import sys; from launch.train import main\n"
        "try: main()\n"
        "except SystemExit: print('wandb' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *small_run, "max_steps=2", "module.schedule.warmup_samples=0"],
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == "False", done.stdout + done.stderr
