import random

import pytest
import torch
from safetensors.torch import load_file

from tests.trainers.checkpoint_saves import Surprise, at_once, held_by, ranks, spoil
from trainers.checkpoint import (
    list_checkpoints,
    load_weights,
    read_last,
    read_manifest,
    verify,
)
from trainers.checkpoint_parts import flatten, without_credentials
from trainers.checkpoint_writer import CheckpointDirectory
from trainers.durable_files import write_atomically
from trainers.stored_tensors import Run


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


KINDS = ["weights.safetensors", "optimizer.safetensors", "state.pt", "manifest.json"]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
@pytest.mark.parametrize("has_older", [True, False])
def test_damage_is_named_and_the_last_whole_one_offered(content, saved, name, damage, has_older):
    for step in (3, 4):
        if has_older:
            older = saved.with_name(f"step-0000000{step}")
            CheckpointDirectory({}).save_checkpoint(content, older)
    if has_older:
        spoil(saved.with_name("step-00000004") / name, "flip")
    spoil(saved / name, damage)
    offer = "whole: checkpoint=step-00000003" if has_older else "no other one is whole"
    with pytest.raises(ValueError, match=rf"checkpoint={saved} -> {name} .*{offer}"):
        verify(saved)


def test_later_one_is_offered_where_none_before_is_whole(content, saved):
    CheckpointDirectory({}).save_checkpoint(content, saved.with_name("step-00000009"))
    spoil(saved / "state.pt", "flip")
    with pytest.raises(ValueError, match="a later one is whole: checkpoint=step-00000009"):
        verify(saved)


def test_every_bit_of_a_manifest_counts(saved):
    file = saved / "manifest.json"
    whole = file.read_bytes()
    draw = random.Random(0)
    for position in draw.sample(range(len(whole) - 1), 300):  # the last is the end of the line
        content = bytearray(whole)
        content[position] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"manifest.json is missing or damaged|format"):
            read_manifest(saved)
    file.write_bytes(whole)
    assert read_manifest(saved)["step"] == 7


def test_sizes_alone_show_what_is_missing_and_not_what_is_changed(saved):
    spoil(saved / "weights.safetensors", "flip")
    assert verify(saved, digests=False)
    with pytest.raises(ValueError, match=r"weights.safetensors is not what was saved \(digest"):
        verify(saved)
    spoil(saved / "weights.safetensors", "cut")
    with pytest.raises(ValueError, match=r"weights.safetensors is not what was saved \(\d+ bytes"):
        verify(saved, digests=False)


def test_file_of_another_rank_that_is_missing_is_named(tmp_path):
    path, writers = tmp_path / "step-00000001", ranks(3)
    at_once(
        [lambda r=rank: writers[r].save_checkpoint(held_by(r, 3, 1), path) for rank in range(3)]
    )
    assert verify(path)["world_size"] == 3
    name = "weights-00002-of-00003.safetensors"
    (path / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing -> do not use it"):
        verify(path)
    with pytest.raises(ValueError, match=rf"{name} -> it is missing"):
        load_weights(path)


def test_disk_that_does_not_give_a_file_is_named(saved, monkeypatch):
    def fail(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("trainers.checkpoint_digests.digest_of", fail)
    with pytest.raises(ValueError, match=r"weights.safetensors is not .*Input/output er"):
        verify(saved)


@pytest.mark.parametrize("text", ["{", "[]", "null", "3", '{"format": 3}', "[" * 10**5, "\udcff"])
def test_damaged_manifest_is_named(saved, text):
    (saved / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"manifest.json is missing or damaged"):
        verify(saved)


def test_state_that_could_not_be_read_again_is_refused_when_saved(content, saved):
    with pytest.raises(ValueError, match=r"state.pt holds objects"):
        CheckpointDirectory({}).save_checkpoint(
            content | {"surprise": Surprise()}, saved.parent / "step-00000008"
        )
    assert list_checkpoints(saved.parent) == [saved]


# -- what is saved ------------------------------------------------------------------------------


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


def test_keys_of_file_systems_stay_at_home():
    config = {"corpus": {"storage_options": {"secret": "x"}, "sources": [{"storage_options": {}}]}}
    assert without_credentials(config) == {
        "corpus": {"storage_options": "(left out)", "sources": [{"storage_options": {}}]}
    }


def test_tensors_are_written_in_the_order_in_which_the_optimizer_has_them():
    """Sets of names have another order in each process."""
    keys = [f"average_{number}" for number in range(20)]
    state = {key: Run.whole(torch.ones(2)) for key in keys} | {"step": 3}
    runs, _, rest = flatten({"state_dict": {}, "optimizer_states": [{"state": {"weight": state}}]})
    assert [*runs] == [f"optimizer.0/{key}/weight" for key in keys]
    assert rest["optimizer_states"][0]["state"] == {"weight": {"step": 3}}
