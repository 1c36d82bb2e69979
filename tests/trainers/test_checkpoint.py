import json

import pytest
import torch
from safetensors.torch import load_file

from trainers.checkpoint import (
    list_checkpoints,
    load_weights,
    read_last,
    verify,
)
from trainers.checkpoint_writer import CheckpointDirectory
from trainers.durable_files import write_atomically


class Surprise:
    """An object whose unpickling would run code."""

    def __reduce__(self):
        return (print, ("code from a checkpoint ran",))


@pytest.fixture
def content():
    torch.manual_seed(0)
    return {
        "state_dict": {"a.weight": torch.randn(3, 4), "b": torch.arange(5)},
        "global_step": 7,
        "optimizer_states": [{"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": []}],
        "loops": {"fit_loop": {"epoch": 0}},
    }


@pytest.fixture
def saved(content, tmp_path):
    path = tmp_path / "step-00000007"
    CheckpointDirectory({"strategy": "ddp"}).save_checkpoint(content, path)
    return path


def test_checkpoint_comes_back_as_it_was(content, saved):
    found = CheckpointDirectory({}).load_checkpoint(saved)
    assert found["loops"] == content["loops"]
    assert found["optimizer_states"] == content["optimizer_states"]
    for name, value in content["state_dict"].items():
        assert torch.equal(found["state_dict"][name].whole(), value)
        assert torch.equal(load_weights(saved)[name], value)
        assert torch.equal(load_file(saved / "weights.safetensors")[name], value)
    manifest = verify(saved)
    assert (manifest["step"], manifest["world_size"]) == (7, 1)
    assert manifest["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("name", ["weights.safetensors", "state.pt"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_named(saved, name, damage):
    file = saved / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if damage == "cut" else content)
    with pytest.raises(ValueError, match=rf"checkpoint={saved} -> {name} .*no older one is whole"):
        verify(saved)


def test_damaged_manifest_is_named(saved):
    (saved / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json is missing or damaged"):
        verify(saved)


def test_newer_format_names_the_version_that_wrote_it(saved):
    manifest = json.loads((saved / "manifest.json").read_text())
    (saved / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(ValueError, match="written by trainyard"):
        verify(saved)


def test_loading_runs_no_code_from_the_file(content, tmp_path, capfd):
    path = tmp_path / "step-00000001"
    CheckpointDirectory({}).save_checkpoint(content, path)
    torch.save(content | {"surprise": Surprise()}, path / "state.pt")
    with pytest.raises(ValueError, match=r"state.pt holds objects .*Unsupported.* -> keep tensors"):
        CheckpointDirectory({}).load_checkpoint(path)
    assert "code from a checkpoint ran" not in capfd.readouterr().out


def test_state_that_could_not_be_read_again_is_refused_when_saved(content, saved):
    with pytest.raises(ValueError, match=r"state.pt holds objects"):
        CheckpointDirectory({}).save_checkpoint(
            content | {"surprise": Surprise()}, saved.parent / "step-00000008"
        )
    assert list_checkpoints(saved.parent) == [saved]


def test_tied_weights_are_saved_under_both_names(content, tmp_path):
    content["state_dict"]["tied"] = content["state_dict"]["a.weight"]
    CheckpointDirectory({}).save_checkpoint(content, tmp_path / "step-00000001")
    found = load_weights(tmp_path / "step-00000001")
    assert torch.equal(found["tied"], found["a.weight"])


def test_failed_write_leaves_what_was_there(content, saved, monkeypatch):
    def no_room(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainers.checkpoint_parts.write_tensors", no_room)
    before = {path.name for path in saved.parent.rglob("*")}
    with pytest.raises(ValueError, match=r"could not be written .*No space left .*make room"):
        CheckpointDirectory({}).save_checkpoint(content, saved.parent / "step-00000008")
    assert {path.name for path in saved.parent.rglob("*")} == before
    assert verify(saved)


def test_saving_the_same_step_again_replaces_it(content, saved):
    content["state_dict"]["b"] += 1
    CheckpointDirectory({}).save_checkpoint(content, saved)
    assert torch.equal(load_weights(saved)["b"], torch.arange(5) + 1)
    assert list_checkpoints(saved.parent) == [saved]


def test_pointer_is_the_old_or_the_new(tmp_path):
    assert read_last(tmp_path) is None
    write_atomically(tmp_path / "last", "step-00000001\n")
    write_atomically(tmp_path / "last", "step-00000002\n")
    assert read_last(tmp_path) == "step-00000002"
    assert [path.name for path in tmp_path.iterdir()] == ["last"]
