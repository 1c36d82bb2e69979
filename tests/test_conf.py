"""Every file of the configuration tree is used, and every experiment takes a step."""

from pathlib import Path

import pytest

CONF = Path(__file__).parent.parent / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
DEBUGS = sorted(path.stem for path in (CONF / "debug").glob("*.yaml"))


@pytest.fixture
def shrunken(text_file, data_dir, tmp_path) -> list[str]:
    """What makes any GPT experiment small, whatever else it chooses."""
    return [
        f"corpus.path={text_file}",
        "corpus.tokenizer=char",
        f"data_dir={data_dir}",
        f"runs_dir={tmp_path / 'runs'}",
        "trainer.accelerator=cpu",
        "batch_tokens=null",
        "batch_samples=4",
        "micro_batch=2",
        "datamodule.sequence_length=16",
        "datamodule.num_workers=0",
        "module.network.num_layers=2",
        "module.network.num_heads=2",
        "module.network.width=16",
        "module.preview.max_new_tokens=4",
        "module.preview.prompts=[a]",
    ]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_takes_a_step(experiment, shrunken, train):
    run = train(f"experiment={experiment}", "debug=one_step", *shrunken)
    assert run.summary["step"] == 1
    assert run.summary["tokens"] == 64


def test_overfit_overlay_learns_its_batch_by_heart(shrunken, train):
    options = ["module.optimizer.lr=0.01", "max_steps=150", "trainer.log_every_steps=150"]
    base = ["experiment=gpt_char_cpu", *shrunken, "micro_batch=null"]
    by_heart = train(*base, "debug=overfit", *options)
    rows = (by_heart.path / "metrics.jsonl").read_text().splitlines()
    assert '"train/loss": 0.' in rows[-2]
    assert by_heart.summary["val/loss"] > 2  # and nothing else


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")
def test_profile_overlay_reports_operators(shrunken, train):
    run = train("experiment=gpt_char_cpu", *shrunken, "debug=profile", "max_steps=5")
    assert "aten::mm" in (run.path / "fit-profile.txt").read_text()


def test_debug_overlays_are_all_tried():
    assert DEBUGS == ["one_step", "overfit", "profile"]


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda p: p.stem)
def test_file_begins_by_saying_what_it_is_for(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @")]
    assert lines[0].startswith("# ")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_gives_its_command(name):
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    assert f"python -m launch.train experiment={name}" in text
