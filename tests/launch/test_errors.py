"""Bad input: one clear message, early, and nothing lost."""

import re
import shutil
import subprocess

import pytest

from launch import runtime
from trainers.checkpoint import list_checkpoints
from trainers.metrics import read_metrics


@pytest.fixture
def refuse(command):
    """Run a verb that must fail; give the message it prints."""

    def run_and_fail(verb, *overrides):
        done = subprocess.run(command(verb, *overrides), capture_output=True, text=True)
        assert done.returncode == runtime.FAILED, done.stdout + done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        return done.stderr

    return run_and_fail


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("experiment=gpt_quikstart", "did you mean gpt_quickstart"),
        ("module.optimiser.lr=1", "did you mean module.optimizer.lr"),
        ("bach_tokens=4", "did you mean batch_tokens"),
        ("strategy=dpp", "did you mean ddp"),
        ("batch_samples=0", "batch_samples=0 -> the global batch is a whole number above 0"),
    ],
)
def test_command_line_mistake_names_what_is_near(refuse, override, message):
    printed = refuse("train", override)
    assert message in printed
    assert printed.startswith(f"error: {override.split('=')[0]}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["micro_batch=3"], r"micro_batch=3 -> .* 8 of the 8 samples .*\[1, 2, 4, 8\]"),
        (["batch_tokens=64"], r"batch_tokens=64, batch_samples=8 -> .* exactly one of"),
        (["max_steps=null"], "nothing -> the run's length must be given by exactly one"),
        (["trainer.devices=2"], "strategy=single -> .* -> use strategy=ddp"),
        (["trainer.devices=3", "strategy=ddp"], "3 ranks -> .* does not divide"),
        (["precision=fp8"], "precision=fp8 -> unknown -> use one of fp32"),
        (["activation_checkpointing=some"], "no such mode -> use none, full"),
        (["module.preset=gpt2_tny"], r"module.preset=gpt2_tny -> .*gpt2_tiny"),
        (["module.schedule.warmup_samples=1000"], "module.schedule.* -> .* -> "),
        (["corpus.path=/nowhere"], "corpus.path=/nowhere -> no such file or folder"),
        (["++bach_tokens=5"], "bach_tokens=5 -> nothing reads such a key -> .* batch_tokens"),
        (["++trainer.val_every_step=5"], "val_every_step=5 -> nothing reads .*val_every_steps"),
        (["checkpoints.every_steps=0"], "checkpoints.every_steps=0 -> .* or null for never"),
        (["checkpoints.monitor=val/los"], "monitor=val/los -> .* -> use one of: .*val/loss"),
        (["datamodule.tail=keep"], "datamodule.tail=keep -> unknown -> choose one of drop, carry"),
        (["cluster.nodes=2", "strategy=ddp"], "cluster.nodes=2 -> .* -> run it on every node"),
        (["run.name=null"], "run.name= -> it names a directory"),
        (["trainer.devices=two"], "trainer.devices=two -> a number of devices"),
        (["checkpoints.every_minutes=often"], "every_minutes=often -> it is a number -> .* never"),
        (["cluster.max_restarts=-1"], "cluster.max_restarts=-1 -> it is a whole number -> use 0"),
        (["module.optimizer.lr=oops"], "module.optimizer.lr=oops -> it is a number -> use 0"),
        (["module.network.num_layers=two"], "num_layers=two -> it is a whole number -> use 1"),
        (["corpus.path=???"], "corpus.path -> it has no value -> add corpus.path="),
        (["checkpoint=step-7"], "checkpoint=step-7 -> .* has none of that name"),
        (["init_from=nobody"], "run=nobody -> no such run"),
    ],
)
def test_impossible_setting_is_refused_before_training(small_run, train, overrides, message):
    with pytest.raises(Exception, match=r".") as error:
        train(*small_run, *overrides)
    printed = runtime.explain(error.value, "train")
    assert printed is not None
    assert re.search(message, printed), printed


def test_empty_corpus_is_refused(small_run, train, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(ValueError, match=r"corpus.path=.*empty.txt.* -> .* -> "):
        train(*small_run, f"corpus.path={empty}")


def test_damaged_checkpoint_is_named_and_the_one_before_offered(small_run, train):
    run = train(*small_run)
    newest = list_checkpoints(run.checkpoints)[-1]
    content = bytearray((newest / "weights.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "weights.safetensors").write_bytes(content)
    longer = [*small_run, "max_steps=24", "resume.extend=true"]
    with pytest.raises(ValueError, match=r"step-00000020 -> weights.safetensors .*") as error:
        train(*longer)
    offered = str(error.value).rpartition("checkpoint=")[2]
    assert offered == "step-00000016"
    assert train(*longer, f"checkpoint={offered}").summary["step"] == 24


def test_going_back_happens_once(small_run, train):
    whole = train(*small_run, "checkpoints.keep_last=9")
    losses = read_metrics(whole.path / "metrics.jsonl")
    back = [*small_run, "checkpoints.keep_last=9", "checkpoint=step-00000010"]
    run = train(*back)
    assert run.summary["step"] == 20
    again = [
        (row["step"], row.get("train/loss")) for row in read_metrics(run.path / "metrics.jsonl")
    ]
    assert again == [(row["step"], row.get("train/loss")) for row in losses]
    assert (run.checkpoints / "abandoned/step-00000020").is_dir()
    saved = [path.stat().st_mtime_ns for path in list_checkpoints(run.checkpoints)]
    train(*back)  # the same command again: it is done
    assert saved == [path.stat().st_mtime_ns for path in list_checkpoints(run.checkpoints)]


def test_shorter_run_needs_to_go_back(small_run, train):
    train(*small_run, "checkpoints.keep_last=9")
    shorter = [*small_run, "max_steps=12", "resume.extend=true"]
    with pytest.raises(ValueError, match=r"step-00000020 is beyond the 12 steps .* go back"):
        train(*shorter)
    assert train(*shorter, "checkpoint=step-00000008").summary["step"] == 12


def test_missing_newest_checkpoint_leaves_a_way_back(small_run, train):
    run = train(*small_run, "max_steps=10")
    shutil.rmtree(run.find_checkpoint("last"))
    longer = [*small_run, "resume.extend=true"]
    with pytest.raises(ValueError, match=r"none of that name -> use one of .*step-00000008"):
        train(*longer)
    assert train(*longer, "checkpoint=step-00000008").summary["step"] == 20


def test_index_that_does_not_match_its_shards_is_refused(small_run, train, compose, tmp_path):
    own_data = f"data_dir={tmp_path / 'own'}"
    run = train(*small_run, own_data)
    (shard, *_) = sorted((tmp_path / "own").rglob("train/*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1024])
    with pytest.raises(ValueError, match=rf"{shard.name}"):
        train(*small_run, own_data, "run.name=another")
    assert run.status["state"] == "done"
