"""`launch.checkpoints`: what there is, whether it is whole, how it differs, converted, deleted."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict_loader import load as load_dcp

from launch.checkpoints import checkpoints
from launch.run_directory import RunDirectory
from tests.launch.test_old_checkpoints import rewrite_in_format_2
from trainers.checkpoint import load_weights, open_checkpoint, read_last, read_manifest, verify
from trainers.checkpoint_comparison import all_tensors

VALIDATED = ["trainer.val_every_steps=10"]


@pytest.fixture(scope="module")
def trained(small_settings, train, tmp_path_factory):
    """A run with the steps 10, 15 and 20."""
    return train(*small_settings, *VALIDATED, f"runs_dir={tmp_path_factory.mktemp('runs')}")


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it to be damaged."""
    shutil.copytree(trained.path, tmp_path / "runs" / "small")
    return RunDirectory(tmp_path / "runs" / "small")


@pytest.fixture
def verb(compose, capfd):
    """Call the verb; gives what was printed, with one blank for several, and expects its code."""

    def call(run, *overrides, code=0):
        config = compose("checkpoints", [f"run={run.path}", *overrides])
        capfd.readouterr()
        assert checkpoints(config) == code
        return re.sub(r"[\s│]+", " ", capfd.readouterr().out)

    return call


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def assert_same(one, other):
    """All tensors, optimizer state among them, with the same bits."""
    a, b = (all_tensors(open_checkpoint(path)) for path in (one, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name].whole(), b[name].whole()) for name in a)


def test_list_shows_what_there_is_and_what_is_wrong(run, verb):
    shutil.copytree(run.checkpoints / "step-00000010", run.checkpoints / "mine")
    (run.checkpoints / "step-00000010" / "manifest.json").write_text("{")
    (run.checkpoints / "step-00000015" / "state.pt").unlink()
    (run.checkpoints / ".step-00000025.abc.partial").mkdir()
    (run.checkpoints / "step-00000030").mkdir()
    (run.checkpoints / "step-00000030" / "manifest.json").write_text('{"format": 9, "step": []}')
    shown = verb(run)
    assert "mine 10 steps, 1,280 tokens" in shown
    assert "by this name no run finds it" in shown
    assert "step-00000020 20 steps, 2,560 tokens" in shown
    assert f"last, best (val/loss {run.summary['val/loss']:.4g})" in shown
    assert "single, 1 rank(s)" in shown
    assert "format 3" in shown
    assert "manifest.json is missing or damaged" in shown
    assert "state.pt is missing" in shown
    assert ".step-00000025.abc.partial: a save or deletion that is under way or was killed" in shown
    assert shown.count("step-00000030") == 1


def test_list_says_what_is_kept_for_good(run, verb):
    config = run.config
    config.checkpoints.keep_every_steps = 10
    run.accept(config)
    assert verb(run).count("kept for good") == 2


def test_verify_names_every_damaged_file(run, verb):
    assert "3 of 3 checkpoint(s) are what was saved" in verb(run, "action=verify")
    flip(run.checkpoints / "step-00000015" / "weights.safetensors")
    flip(run.checkpoints / "step-00000015" / "state.pt")
    shown = verb(run, "action=verify", code=1)
    (line,) = re.findall(r"step-00000015: (.*?) step-00000020", shown)
    assert "weights.safetensors is not what was saved (digest " in line
    assert "state.pt is not what was saved (digest " in line
    assert "2 of 3 checkpoint(s)" in shown
    assert "1 of 1" in verb(run, "action=verify", "checkpoint=last")


def test_compare_finds_the_one_value_that_was_changed(run, verb, tmp_path):
    same = verb(run, "action=compare", "checkpoint=last", "with=last")
    count = len(all_tensors(open_checkpoint(run.checkpoints / "step-00000020")))
    assert f"{count} tensor(s) are identical, 0 differ" in same
    verb(run, "action=convert", f"to={tmp_path / 'other'}")
    file = tmp_path / "other" / "weights.safetensors"
    name, weights = "network.embedding.weight", load_file(file)
    relative = 0.5 / float(weights[name].double().norm())
    content = bytearray(file.read_bytes())
    place = content.index(weights[name].numpy().tobytes())
    content[place : place + 4] = (weights[name].flatten()[:1] + 0.5).numpy().tobytes()
    file.write_bytes(content)
    shown = verb(run, "action=compare", f"with={tmp_path / 'other'}")
    assert f"{count - 1} tensor(s) are identical, 1 differ" in shown
    assert f"weights/{name} F32 0.5 {relative:.3g} " in shown


def test_compare_says_what_of_configuration_and_facts_differs(run, verb, train, small_run):
    other = train(
        *small_run, "run.name=other", "module.optimizer.lr=0.5", "max_steps=10",
        "module.network.tie_embeddings=false",
    )  # fmt: skip
    shown = verb(run, "action=compare", "checkpoint=step-00000010", f"with={other.path}/last")
    assert "module.optimizer.lr: 0.001 -> 0.5" in shown
    assert "run: small -> other" in shown
    assert f"only in {other.checkpoints / 'step-00000010'}: weights/network.head.weight" in shown
    assert "step: " not in shown


@pytest.mark.parametrize("ranks", [1, 3])
def test_run_continues_from_a_converted_checkpoint_with_the_same_bits(
    run, verb, train, small_settings, tmp_path, ranks
):
    source, converted = run.checkpoints / "step-00000010", tmp_path / "converted"
    verb(run, "action=convert", f"checkpoint={source.name}", f"to={converted}", f"ranks={ranks}")
    assert len([*converted.glob("weights*.safetensors")]) == ranks
    assert verify(converted)["world_size"] == ranks
    assert_same(source, converted)
    before = {
        name: value.clone()
        for name, value in load_weights(run.checkpoints / "step-00000020").items()
    }
    for path in run.checkpoints.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (run.path / "summary.json").unlink()
    shutil.copytree(converted, run.checkpoints / source.name)
    (run.checkpoints / "last").write_text(f"{source.name}\n")
    again = train(*small_settings, *VALIDATED, f"runs_dir={run.path.parent}")
    after = load_weights(again.checkpoints / "step-00000020")
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_format_2_is_converted_with_the_same_bits(run, verb, tmp_path):
    source, old = run.checkpoints / "step-00000010", tmp_path / "step-00000010"
    shutil.copytree(source, old)
    rewrite_in_format_2(old)
    assert read_manifest(old)["format"] == 2
    assert_same(source, old)
    verb(run, "action=convert", f"checkpoint={old}", f"to={tmp_path / 'new'}", "ranks=2")
    assert verify(tmp_path / "new")["format"] == 3
    assert_same(source, tmp_path / "new")
    assert "format 2 does not have it" in verb(
        run, "action=compare", f"checkpoint={old}", "with=last"
    )


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_weights_leave_for_torch_distributed_checkpoint(run, verb, tmp_path):
    verb(run, "action=convert", "form=dcp", f"to={tmp_path / 'dcp'}")
    exact = load_weights(run.checkpoints / "step-00000020")
    found = {name: torch.empty_like(value) for name, value in exact.items()}
    load_dcp(found, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert all(torch.equal(found[name], exact[name]) for name in exact)


def test_converted_weights_in_bf16_start_a_run_in_fp32(run, verb, train, small_run, tmp_path):
    verb(run, "action=convert", f"to={tmp_path / 'half'}", "dtype=bf16")
    exact, rounded = (
        load_weights(p) for p in (run.checkpoints / "step-00000020", tmp_path / "half")
    )
    assert all(torch.equal(rounded[n], exact[n].bfloat16()) for n in exact)
    states = [
        open_checkpoint(p).optimizer_states
        for p in (run.checkpoints / "step-00000020", tmp_path / "half")
    ]
    assert {
        v.dtype for s in states[1][0]["state"].values() for v in s.values() if hasattr(v, "read")
    } == {torch.float32}
    resting = [
        *small_run,
        "module.optimizer.lr=0",
        "module.optimizer.weight_decay=0",
        "max_steps=1",
    ]
    other = train(
        *resting,
        "module.schedule.warmup_samples=0",
        f"init_from={tmp_path / 'half'}",
        "run.name=other",
    )
    weights = load_weights(other.checkpoints / "step-00000001")
    assert all(torch.equal(weights[n], rounded[n].float()) for n in weights)
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_convert_refuses_what_cannot_be(run, verb, tmp_path):
    for settings, message in {
        ("to=null",): "to=None -> it has no value",
        (f"to={run.path}",): "it is there already",
        (f"to={tmp_path / 'x'}", "dtype=int8"): "dtype=int8 -> unknown -> use fp32, bf16, fp16",
        (f"to={tmp_path / 'x'}", "ranks=0"): "ranks=0 -> no number of files",
        (f"to={tmp_path / 'x'}", "form=npz"): "form=npz -> unknown",
        (f"to={tmp_path / 'x'}", "form=dcp", "ranks=2"): "form=dcp -> unknown, or not to be had",
    }.items():
        with pytest.raises(ValueError, match=message):
            verb(run, "action=convert", *settings)
    flip(run.checkpoints / "step-00000020" / "optimizer.safetensors")
    with pytest.raises(ValueError, match=r"optimizer.safetensors is not what was saved"):
        verb(run, "action=convert", f"to={tmp_path / 'x'}")
    assert [*tmp_path.glob("*x*")] == []


def test_delete_frees_what_is_not_needed(run, verb):
    path = run.checkpoints / "step-00000010"
    assert f"would delete {path} and free" in verb(run, "action=delete", "checkpoint=step-00000010")
    assert path.is_dir()
    assert f"deleted {path}" in verb(run, "action=delete", f"checkpoint={path.name}", "yes=true")
    assert not path.exists()
    assert read_last(run.checkpoints) == "step-00000020"


@pytest.mark.parametrize("which", [".", "..", "abandoned"])
def test_delete_takes_one_checkpoint_and_no_folder_of_them(run, verb, which):
    (run.checkpoints / "abandoned").mkdir(exist_ok=True)
    before = {*run.path.rglob("*")}
    with pytest.raises(ValueError, match="checkpoint="):
        verb(run, "action=delete", f"checkpoint={which}", "yes=true", "force=true")
    assert {*run.path.rglob("*")} == before


def test_delete_refuses_the_last_and_the_best(run, verb):
    best = {"checkpoint": "step-00000015", "metric": "val/loss", "value": 1.0}
    (run.checkpoints / "best").write_text(json.dumps(best))
    for which, name in {"last": "step-00000020", "best": "step-00000015"}.items():
        with pytest.raises(ValueError, match=rf"checkpoint={name} -> it is {which}, .*force=true"):
            verb(run, "action=delete", f"checkpoint={which}", "yes=true")
    (run.checkpoints / "step-00000010" / "state.pt").write_bytes(b"")
    verb(run, "action=delete", "checkpoint=last", "yes=true", "force=true")
    assert read_last(run.checkpoints) == "step-00000015"
    verb(run, "action=delete", "checkpoint=best", "yes=true", "force=true")
    assert not (run.checkpoints / "best").exists()
    assert read_last(run.checkpoints) is None  # the one that is left is damaged
    assert (run.checkpoints / "step-00000010").is_dir()


HOLD = """
import sys
from pathlib import Path
from launch.run_directory import RunDirectory
with RunDirectory(Path(sys.argv[1])).lock():
    print("holds it", flush=True)
    sys.stdin.read()
"""


def test_delete_refuses_while_the_run_trains(run, verb):
    command = [sys.executable, "-c", HOLD, str(run.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(ValueError, match="is training it now"):
            verb(run, "action=delete", "checkpoint=step-00000010", "yes=true")
        holder.communicate()
    assert (run.checkpoints / "step-00000010").is_dir()


def test_settings_of_other_actions_are_refused(run, verb):
    with pytest.raises(ValueError, match="action=drop -> unknown -> use one of list, verify"):
        verb(run, "action=drop")
    with pytest.raises(ValueError, match="force=True -> action=verify does not read it"):
        verb(run, "action=verify", "force=true")
    with pytest.raises(ValueError, match="checkpoint=null -> none is named"):
        verb(run, "action=delete")
    with pytest.raises(ValueError, match="with=null -> "):
        verb(run, "action=compare")
    with pytest.raises(ValueError, match="has none of that name -> use one of last, best, step-"):
        verb(run, "action=verify", "checkpoint=step-00000099")
