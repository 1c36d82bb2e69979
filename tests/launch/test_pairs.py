"""Two parallel text files: prepared, trained on, scored and translated, a command each."""

import json

import pytest

from launch.evaluate import evaluate_run
from launch.generate import generate
from launch.prepare import prepare
from launch.run_directory import RunDirectory


@pytest.fixture
def overrides(pair_files, data_dir):
    sides = [f"corpus.train.{side}={path}" for side, path in pair_files.items()]
    return [*sides, f"data_dir={data_dir}", "corpus.test_fraction=0.1"]


@pytest.fixture
def settings(overrides, tmp_path):
    return [
        "experiment=translation_small",
        *overrides,
        f"runs_dir={tmp_path / 'runs'}",
        "trainer.accelerator=cpu",
        "trainer.val_every_steps=30",
        "checkpoints.every_steps=30",
        "batch_samples=32",
        "max_samples=null",
        "max_steps=60",
        "module.preset=tiny",
        "module.network={num_heads: 2, head_width: 16, width: 32, mlp_width: 64, "
        "share_embeddings: false}",
        "module.optimizer.lr=0.01",
        "module.generation.max_new_tokens=12",
        "datamodule.max_source_tokens=12",
        "datamodule.max_target_tokens=12",
        "datamodule.longer=raise",
    ]


@pytest.fixture
def run(settings, train) -> RunDirectory:
    return train(*settings)


def test_pairs_are_trained_on_scored_and_answered(run, compose, capfd):
    settings = [f"run={run.path}"]
    assert run.summary["val/perplexity"] < 8  # words alone, of eight, would be at nine
    assert "tok:13a" in run.summary["signatures"]["bleu"]
    capfd.readouterr()
    evaluate_run(compose("evaluate", [*settings, "split=test"]))
    printed = capfd.readouterr().out
    report = json.loads(next((run.path / "evaluations").glob("test-*.json")).read_text())
    assert {"test/perplexity", "test/bleu", "test/chrf", "test/rougeL"} <= {*report}
    assert report["signatures"]["bleu"] in printed
    lines = next((run.path / "evaluations").glob("test-*.jsonl")).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == run.config.data.pairs.test
    assert all(" ".join(source.split()[::-1]) == target for source, target, _ in rows)
    evaluate_run(compose("evaluate", [*settings, "split=test", "num_beams=3"]))
    path = next((run.path / "evaluations").glob("test-*-num_beams=3.json"))
    beams = json.loads(path.read_text())
    assert beams["num_beams"] == 3
    assert beams["test/loss"] == report["test/loss"]
    assert path.with_suffix(".jsonl").read_text().splitlines() != lines
    capfd.readouterr()
    best = rows[0]
    generate(compose("generate", [*settings, f"prompt={best[0]}"]))
    assert capfd.readouterr().out.strip() == best[2]  # the answer alone, as it was in the test
    with pytest.raises(ValueError, match=r"its 13 tokens .* more than the 12"):
        generate(compose("generate", [*settings, f"prompt={' '.join(['sea'] * 12)}"]))
    with pytest.raises(ValueError, match="stop=false -> an answer of EncoderDecoder"):
        generate(compose("generate", [*settings, "prompt=sea", "stop=false"]))


def test_other_pairs_start_from_a_run_with_its_vocabularies(run, settings, train):
    other = [*settings, "run.name=other", "corpus.seed=3", "max_steps=1", f"init_from={run.path}"]
    with pytest.raises(ValueError, match=r"corpus.tokenizer=.*/tokenizer.json") as refused:
        train(*other, "corpus.vocab_size=6")
    assert "(10 tokens) than that of the data (6 tokens" in str(refused.value)
    files = [f"corpus.{name}={run.path}/{name}.json" for name in ("tokenizer", "target_tokenizer")]
    begun = train(*other, *files)
    assert begun.config.data.digest != run.config.data.digest
    assert begun.summary["val/loss"] < run.summary["val/loss"] + 0.5


def test_pairs_read_as_text_are_refused(overrides, train, tmp_path):
    run = [f"runs_dir={tmp_path / 'runs'}", "batch_samples=4", "max_steps=1"]
    with pytest.raises(ValueError, match="datamodule=text -> the corpus has pairs"):
        train(
            "corpus=pairs",
            "corpus.tokenizer=char",
            "datamodule.sequence_length=8",
            *overrides,
            *run,
        )


def test_files_of_unequal_length_are_refused_by_both_counts(overrides, compose, tmp_path):
    (tmp_path / "short").write_text("one line\n")
    other = [*overrides, f"corpus.train.target={tmp_path / 'short'}"]
    with pytest.raises(ValueError, match=r"600 .* 1 "):
        prepare(compose("prepare", ["corpus=pairs", *other]))


def test_pairs_longer_than_the_model_takes_are_refused(overrides, train, tmp_path):
    with pytest.raises(ValueError, match=r"datamodule\.max_source_tokens=3 -> .* longer"):
        train(
            "experiment=translation_small",
            *overrides,
            f"runs_dir={tmp_path / 'runs'}",
            "trainer.accelerator=cpu",
            "datamodule.max_source_tokens=3",
            "datamodule.longer=raise",
        )
