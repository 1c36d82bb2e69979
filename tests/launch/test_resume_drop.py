"""Going on with another optimizer: `resume.drop=optimizer`."""

import shutil

import pytest
from torch import equal

from launch import runtime
from trainers.callbacks.preemption import Preemption
from trainers.checkpoint import load_weights, open_checkpoint
from trainers.metrics import read_metrics

SGD = ["module.optimizer.name=sgd", "resume.extend=true"]
DROP = [*SGD, "resume.drop=optimizer"]


@pytest.fixture
def begun(small_run, train):
    """A run of 10 steps by AdamW."""
    return train(*small_run, "max_steps=10", "checkpoints.keep_last=9")


@pytest.fixture
def continue_copy(small_run, train, begun, tmp_path):
    def go_on(name, *overrides, **options):
        path = tmp_path / "copies" / "small"
        if not path.exists():
            shutil.copytree(begun.path, path)
        run = train(*small_run, f"runs_dir={path.parent}", *overrides, **options)
        return run.path.rename(path.with_name(name)) if name else run

    return go_on


def last_weights(path):
    return load_weights(path / "checkpoints" / (path / "checkpoints/last").read_text().strip())


def rates(path):
    rows = read_metrics(path / "metrics.jsonl")
    return {row["step"]: row["train/lr"] for row in rows if "train/lr" in row}


def test_another_optimizer_needs_a_permission(small_run, train, begun):
    with pytest.raises(ValueError, match=r"(?s)name: adamw -> sgd.*add resume.drop=optimizer"):
        train(*small_run, *SGD)
    with pytest.raises(ValueError, match=r"drop=weights -> unknown -> use null or optimizer"):
        train(*small_run, *SGD, "resume.drop=weights")


def test_state_is_dropped_once(begun, continue_copy, capfd, monkeypatch):
    in_one = continue_copy("one", *DROP)
    printed = capfd.readouterr().out
    assert "continues from step-00000010 (saved by single on 1 rank(s)), without its" in printed
    with monkeypatch.context() as patch:
        patch.setattr(Preemption, "_agree", lambda self, trainer: trainer.global_step == 15)
        continue_copy("", *DROP, code=runtime.PREEMPTED)
    assert "without its optimizer state" in capfd.readouterr().out
    in_two = continue_copy("two", *DROP)
    assert "without its" not in capfd.readouterr().out
    one, two = last_weights(in_one), last_weights(in_two)
    assert all(equal(one[name], two[name]) for name in one)
    begin = last_weights(begun.path)
    assert not any(equal(one[name], begin[name]) for name in one)
    (state,) = open_checkpoint(in_one / "checkpoints/step-00000020").optimizer_states
    keys = {key for values in state["state"].values() for key in values}
    assert keys == {"momentum_buffer"}


def test_rates_are_where_their_schedule_is(train, small_run, begun, continue_copy):
    dropped = rates(continue_copy("one", *DROP))
    whole = rates(train(*small_run, "run.name=sgd", "module.optimizer.name=sgd").path)
    for step in range(11, 21):
        assert dropped[step] == pytest.approx(whole[step])


def test_checkpoint_of_another_optimizer_is_refused_though_the_run_was_accepted(
    train, small_run, begun, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr("launch.train.fit", lambda run, config: 0)  # it ends before its first save
        train(*small_run, *DROP)
    with pytest.raises(ValueError, match=r"step 10 has what adamw remembers.*resume.drop"):
        train(*small_run, *SGD)
