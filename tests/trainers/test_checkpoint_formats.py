"""Checkpoints of other formats, and crafted ones: named, and no code of them is run."""

import json
import pickle

import pytest
import torch

from tests.trainers.checkpoint_saves import Surprise, spoil, write_format_2
from trainers.checkpoint import load_weights, open_checkpoint, read_manifest, verify
from trainers.checkpoint_digests import seal
from trainers.checkpoint_writer import CheckpointDirectory
from trainers.stored_tensors import Stored


def rewrite(path, **changes):
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    manifest.pop("blake2b", None)
    (path / "manifest.json").write_text(seal(manifest))


@pytest.mark.parametrize("number", [1, 99])
def test_other_format_names_the_version_that_wrote_it(saved, number):
    rewrite(saved, format=number, versions={"trainyard": "7.8.9"}, files=None, tensors=None)
    message = rf"checkpoint={saved} -> written by trainyard 7.8.9 in format {number}, this one"
    for read in (verify, open_checkpoint, load_weights):
        with pytest.raises(ValueError, match=message):
            read(saved)


@pytest.mark.parametrize(
    "name", ["../step-00000001/state.pt", "/etc/passwd", "a/b", "..", ".", "", "state.pt/"]
)
def test_manifest_that_names_files_elsewhere_is_refused(saved, name):
    files = read_manifest(saved)["files"]
    rewrite(saved, files={**files, name: files["state.pt"]})
    with pytest.raises(ValueError, match=r"manifest.json .* which is no file of a checkpoint"):
        verify(saved)


def test_manifest_that_leaves_elements_out_gives_none_of_them(saved):
    tensors = read_manifest(saved)["tensors"]
    tensors["weights/a.weight"]["pieces"] = [[0, 0, 5]]
    rewrite(saved, tensors=tensors)
    with pytest.raises(ValueError, match=r"a.weight\[0:5\]|no piece"):
        open_checkpoint(saved).weights["a.weight"].whole()
    tensors["weights/a.weight"]["pieces"] = []
    rewrite(saved, tensors=tensors)
    with pytest.raises(ValueError, match=r"no piece for some of weights/a.weight"):
        open_checkpoint(saved).weights["a.weight"].whole()


def test_loading_runs_no_code_from_the_file(content, tmp_path, capfd):
    path = tmp_path / "step-00000001"
    CheckpointDirectory({}).save_checkpoint(content, path)
    torch.save(content | {"surprise": Surprise()}, path / "state.pt")
    with pytest.raises(ValueError, match=r"state.pt holds objects .*Unsupported.* -> keep tensors"):
        CheckpointDirectory({}).load_checkpoint(path)
    (path / "state.pt").write_bytes(pickle.dumps(Surprise(), 2))  # not in torch's archive
    with pytest.raises(ValueError, match=r"state.pt (is damaged|holds objects)"):
        CheckpointDirectory({}).load_checkpoint(path)
    assert "code from a checkpoint ran" not in capfd.readouterr().out
    pickle.loads(pickle.dumps(Surprise(), 2))
    assert "code from a checkpoint ran" in capfd.readouterr().out


@pytest.mark.parametrize("keeps", [0, 0.5, 0.99])
def test_state_that_is_cut_is_named(saved, keeps):
    file = saved / "state.pt"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keeps * len(whole))])
    with pytest.raises(ValueError, match=r"state.pt is damaged .* -> choose another checkpoint"):
        open_checkpoint(saved).state  # noqa: B018


# -- format 2 -----------------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path):
    """A checkpoint as it was written in format 2: all by rank 0, optimizer state in `state.pt`."""
    path = tmp_path / "step-00000009"
    weight, moment = torch.randn(3, 4), torch.rand(3, 4)
    weights = {"a.weight": weight, "tied": weight.clone(), "scale": torch.tensor(2.0)}
    values = {"step": torch.tensor(9.0), "exp_avg": moment, "row": torch.rand(3)}
    scalar = {"step": torch.tensor(9.0), "exp_avg": torch.tensor(0.5)}
    groups = [{"lr": 0.1, "params": ["a.weight", "scale"]}]
    state = {
        "global_step": 9,
        "optimizer_states": [
            {"state": {"a.weight": values, "scale": scalar}, "param_groups": groups}
        ],
        "lr_schedulers": [{"last_epoch": 9}],
        "loops": {"fit_loop": {"epoch": 0}},
    }
    versions = {"trainyard": "0.1.0", "torch": "2.13.0", "lightning": "2.6.6"}
    write_format_2(path, weights, state, step=9, versions=versions, strategy="ddp", world_size=2)
    return path, weight, state


def test_format_2_is_read(old):
    path, weight, state = old
    assert verify(path)["step"] == 9
    found = load_weights(path)
    assert found.keys() == {"a.weight", "tied", "scale"}
    assert torch.equal(found["a.weight"], weight)
    loaded = CheckpointDirectory({}).load_checkpoint(path)
    assert (loaded["loops"], loaded["global_step"]) == (state["loops"], 9)
    mine, theirs = loaded["optimizer_states"][0], state["optimizer_states"][0]
    assert mine["param_groups"] == theirs["param_groups"]
    for name, values in theirs["state"].items():
        for key, value in values.items():
            here = mine["state"][name][key]
            assert isinstance(here, Stored) == (key == "exp_avg")  # what strategies cut
            here = here.whole() if isinstance(here, Stored) else here
            assert torch.equal(here, value)
    assert mine["state"]["a.weight"]["exp_avg"].run(5, 7).shape == (2,)


def test_damage_of_format_2_is_named(old):
    path, *_ = old
    spoil(path / "weights.safetensors", "flip")
    with pytest.raises(ValueError, match=r"weights.safetensors is not what was saved"):
        verify(path)


def test_format_2_runs_no_code(old, capfd):
    path, _, state = old
    torch.save(state | {"surprise": Surprise()}, path / "state.pt")
    with pytest.raises(ValueError, match=r"state.pt holds objects .*Unsupported"):
        CheckpointDirectory({}).load_checkpoint(path)
    (path / "weights.safetensors").write_bytes(pickle.dumps(Surprise(), 2))
    with pytest.raises(ValueError, match="no safetensors file"):
        load_weights(path)
    assert "code from a checkpoint ran" not in capfd.readouterr().out
