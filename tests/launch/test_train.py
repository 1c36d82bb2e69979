"""A run in one process: what it leaves behind, and how the same command continues it."""

import json
import os
import random
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import equal

from launch import runtime
from launch.completion import complete
from launch.run_directory import RunDirectory
from modules.gpt import GPT
from trainers.callbacks.preemption import Preemption
from trainers.checkpoint import list_checkpoints
from trainers.metrics import read_metrics


def weights(run):
    return load_file(run.find_checkpoint("last") / "weights.safetensors")


def assert_same_weights(one, other):
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(equal(a[name], b[name]) for name in a)


def steps_with(run, key):
    return [row["step"] for row in read_metrics(run.path / "metrics.jsonl") if key in row]


def losses(run):
    rows = read_metrics(run.path / "metrics.jsonl")
    return [row["train/loss"] for row in rows if "train/loss" in row]


def test_run_leaves_what_it_promises(small_run, train, capfd):
    run = train(*small_run, draws=True)
    printed = capfd.readouterr().out
    assert run.status["state"] == "done"
    assert steps_with(run, "train/loss") == list(range(1, 21))
    assert steps_with(run, "val/loss") == [8, 16, 20]
    for name in ("config.yaml", "losses.png", "tokenizer.json", "samples/step-00000020.jsonl"):
        assert (run.path / name).stat().st_size > 0
        assert name.startswith(("config", "tokenizer")) or str(run.path / name) in printed
    assert (run.path / "losses.png").read_bytes().startswith(b"\x89PNG")
    row = next(row for row in read_metrics(run.path / "metrics.jsonl") if row["step"] == 3)
    assert (row["samples"], row["tokens"]) == (24, 24 * 16)
    assert row["perf/tokens_per_s"] > 0
    assert run.summary["val/loss"] < 3.3  # 28 characters: ln 28 = 3.33 before training


def test_finished_run_reports_and_trains_nothing(small_run, train, capfd):
    run = train(*small_run)
    before = {path: path.stat().st_mtime_ns for path in run.checkpoints.rglob("*")}
    capfd.readouterr()
    train(*small_run)
    assert "done" in capfd.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in run.checkpoints.rglob("*")}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_killed_run_ends_with_the_same_bits(small_run, train, start, num_workers):
    long = [*small_run, "max_steps=120", f"datamodule.num_workers={num_workers}"]
    whole = train(*long, "run.name=whole")
    step = random.randint(6, 80)
    print(f"killed after step {step}")
    killed_path = whole.path.parent / "killed"
    process = start(*long, "run.name=killed")
    start.wait(process, killed_path, step)
    process.kill()
    process.wait()
    resumed = train(*long, "run.name=killed")
    assert_same_weights(whole, resumed)
    assert steps_with(resumed, "val/loss") == steps_with(whole, "val/loss")
    assert steps_with(resumed, "train/loss") == list(range(1, 121))


def test_resume_comparison_can_fail(small_run, train):
    one = train(*small_run, "run.name=one")
    other = train(*small_run, "run.name=other", "seed=2")
    with pytest.raises(AssertionError):
        assert_same_weights(one, other)


def assert_stopped(run_path, name):
    status = json.loads((run_path / "status.json").read_text())
    assert status["state"] == "preempted"
    assert name in status["reason"]
    assert (run_path / "checkpoints/last").read_text().strip() == f"step-{status['step']:08d}"


def test_stopped_run_saves_says_so_and_continues(small_run, train, start, tmp_path):
    long = [*small_run, "max_steps=200", "checkpoints.every_steps=null"]
    whole = train(*long, "run.name=whole")
    journal = f"_target_: tests.cluster.journal.Journal, folder: {tmp_path / 'journal'}"
    long.append(f"+trainer.callbacks.journal={{{journal}, linger_s: 0.05, linger_from: 3}}")
    process, run_path = start(*long), tmp_path / "runs" / "small"
    start.wait(process, run_path, 3)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == runtime.PREEMPTED
    assert_stopped(run_path, "SIGTERM")
    assert "run small: preempted: SIGTERM" in output
    assert_same_weights(whole, train(*long))


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGINT"])
def test_other_signals_stop_the_run_as_well(small_run, train, monkeypatch, name):
    agree = Preemption._agree

    def ask_and_agree(self, trainer):
        if trainer.global_step == 3:
            os.kill(os.getpid(), getattr(signal, name))
        return agree(self, trainer)

    monkeypatch.setattr(Preemption, "_agree", ask_and_agree)
    run = train(*small_run, "checkpoints.every_steps=null", code=runtime.PREEMPTED)
    assert_stopped(run.path, name)


def test_module_without_validation_is_saved_at_its_end(small_run, train, monkeypatch):
    for name in ("validation_step", "on_validation_epoch_end"):
        monkeypatch.delattr(GPT, name)
    run = train(*small_run, "checkpoints.every_steps=null")
    assert [path.name for path in list_checkpoints(run.checkpoints)] == ["step-00000020"]
    assert run.summary["checkpoint"].endswith("step-00000020")
    assert "val/loss" not in run.summary


@pytest.mark.parametrize("step", [8, 9, 20])
def test_stop_at_a_validation_neither_repeats_nor_misses_it(small_run, train, monkeypatch, step):
    log = GPT.on_validation_epoch_end

    def log_step(self):  # the first validation, of step 8, is the best
        log(self)
        self.log("val/step", float(self.global_step))

    monkeypatch.setattr(GPT, "on_validation_epoch_end", log_step)
    settings = [*small_run, "checkpoints.monitor=val/step"]
    whole = train(*settings, "run.name=whole")
    with monkeypatch.context() as patched:
        patched.setattr(Preemption, "_agree", lambda self, trainer: trainer.global_step == step)
        train(*settings, code=runtime.DONE if step == 20 else runtime.PREEMPTED)
    run = train(*settings)
    assert_same_weights(whole, run)
    assert json.loads((run.checkpoints / "best").read_text())["checkpoint"] == "step-00000008"
    assert run.find_checkpoint("best").name == whole.find_checkpoint("best").name
    assert steps_with(run, "val/loss") == [8, 16, 20]
    assert steps_with(run, "train/loss") == list(range(1, 21))


def test_training_longer_needs_to_be_said(small_run, train):
    run = train(*small_run)
    longer = [*small_run, "max_steps=30", "module.schedule.name=constant"]
    with pytest.raises(ValueError, match=r"max_steps: 20 -> 30"):
        train(*longer)
    train(*small_run, "max_steps=30", "resume.extend=true")
    assert steps_with(run, "train/loss") == list(range(1, 31))


def test_only_free_keys_may_change(small_run, train):
    train(*small_run, "run.name=free")
    longer = [*small_run, "run.name=free", "max_steps=24", "resume.extend=true"]
    with pytest.raises(ValueError, match=r"module.optimizer.lr: 0.001 -> 0.5"):
        train(*longer, "module.optimizer.lr=0.5")
    free = ["micro_batch=2", "activation_checkpointing=full", "datamodule.num_workers=1"]
    run = train(*longer, *free)
    assert run.summary["step"] == 24


def test_unsaved_run_may_change_everything(small_run, compose):
    config = compose("train", small_run)
    complete(config, 1)
    run = RunDirectory(Path(config.runs_dir, "small"))
    run.path.mkdir(parents=True)
    run.accept(config)
    config.module.optimizer.lr = 0.5
    run.accept(config)
    assert run.config.module.optimizer.lr == 0.5


def test_accumulation_trains_the_same(small_run, train):
    no_dropout = [*small_run, "module.network.dropout=0.0"]
    whole = train(*no_dropout, "run.name=whole")
    split = train(*no_dropout, "run.name=split", "micro_batch=2")
    assert losses(whole) == pytest.approx(losses(split), abs=1e-5)
    assert steps_with(split, "val/loss") == [8, 16, 20]


def test_accumulation_may_change_in_mid_run(small_run, train, monkeypatch):
    no_dropout = [*small_run, "module.network.dropout=0.0", "max_steps=30"]
    whole = train(*no_dropout, "run.name=whole")
    with monkeypatch.context() as patched:
        patched.setattr(Preemption, "_agree", lambda self, trainer: trainer.global_step == 9)
        train(*no_dropout, code=runtime.PREEMPTED)
    resumed = train(*no_dropout, "micro_batch=2")
    assert steps_with(resumed, "val/loss") == steps_with(whole, "val/loss")
    assert steps_with(resumed, "train/loss") == list(range(1, 31))
    assert resumed.summary["val/loss"] == pytest.approx(whole.summary["val/loss"], abs=1e-3)


def test_second_process_is_refused(small_run, train, start):
    process = start(*small_run, "max_steps=100000")
    overrides = dict(override.split("=", 1) for override in small_run)
    run = RunDirectory(Path(overrides["runs_dir"], "small"))
    start.wait(process, run.path, 1)
    with pytest.raises(ValueError, match=f"process {process.pid} is training it now"):
        train(*small_run, "max_steps=100000")


def test_weights_of_another_run_can_be_the_start(small_run, train):
    source = train(*small_run, "run.name=source")
    base = [*small_run, "max_steps=1", "module.schedule.warmup_samples=0"]
    started = train(*base, "run.name=started", f"init_from={source.path}")
    fresh = train(*base, "run.name=fresh")
    first = [read_metrics(run.path / "metrics.jsonl")[0]["train/loss"] for run in (started, fresh)]
    assert first[0] < first[1] - 0.2
    with pytest.raises(ValueError, match=r"init_from=.* -> its tokenizer.json is another vocab"):
        train(*base, "run.name=other", "corpus.tokenizer=byte", f"init_from={source.path}")


def test_old_checkpoints_are_dropped_but_for_a_reason(small_run, train):
    options = ["checkpoints.keep_last=1", "checkpoints.keep_every_steps=10"]
    run = train(*small_run, *options)
    best = json.loads((run.checkpoints / "best").read_text())
    kept = {path.name for path in list_checkpoints(run.checkpoints)}
    assert kept == {"step-00000010", "step-00000020", best["checkpoint"]}
    assert best["value"] == min(
        row["val/loss"] for row in read_metrics(run.path / "metrics.jsonl") if "val/loss" in row
    )


def test_diverged_run_stops_and_says_so(small_run, train):
    options = ["module.optimizer.name=sgd", "module.optimizer.lr=1e30", "run.name=diverged"]
    with pytest.raises(FloatingPointError, match=r"diverged.*lower module.optimizer.lr"):
        train(*small_run, *options, "module.optimizer.gradient_clip=null")


def test_ignored_environment_is_left_alone(small_run, train):
    before = dict(os.environ)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    train(*small_run)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert set(os.environ) - set(before) <= {"HYDRA_FULL_ERROR"}


@pytest.mark.parametrize("every", [3, 4, 8])
def test_finished_run_is_trained_longer_wherever_its_last_validation_fell(small_run, train, every):
    run = [*small_run, f"trainer.val_every_steps={every}", "trainer.log_every_steps=4"]
    train(*run, "max_steps=8")
    longer = train(*run, "max_steps=12", "resume.extend=true")
    assert longer.summary["step"] == 12
    rows = read_metrics(longer.path / "metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 4, 8, 12]
