"""Saving beside the training."""

import resource
import threading
import time

import pytest
import torch

from tests.trainers.checkpoint_saves import lightning_content, save_as_a_run_does
from trainers import checkpoint_parts
from trainers.checkpoint import load_weights, open_checkpoint, read_last, verify
from trainers.checkpoint_writer import CheckpointDirectory


@pytest.fixture
def gate(monkeypatch):
    """Files are written only when this event is set."""
    gate, write = threading.Event(), checkpoint_parts.write_tensors

    def slow(path, entries):
        assert gate.wait(timeout=30)
        return write(path, entries)

    monkeypatch.setattr(checkpoint_parts, "write_tensors", slow)
    yield gate
    gate.set()


@pytest.fixture
def writer():
    return CheckpointDirectory({"strategy": "single"}, asynchronous=True)


def save_and_change_at_once(writer, path, gate):
    content = lightning_content(1)
    moment = content["optimizer_states"][0]["state"]["a.weight"]["exp_avg"].values
    writer.save_checkpoint(content, path)
    assert not path.exists()
    for tensor in (*content["state_dict"].values(), moment):
        tensor.fill_(77)
    content["loops"]["fit_loop"]["epoch"] = 77
    content["optimizer_states"][0]["state"]["a.weight"]["step"].fill_(77)
    gate.set()
    writer.wait()
    stored = open_checkpoint(path)
    state = stored.optimizer_states[0]["state"]["a.weight"]
    return [
        *(tensor.flatten()[0].item() for tensor in load_weights(path).values()),
        state["exp_avg"].whole()[0, 0].item(),
        state["step"].item(),
        stored.state["loops"]["fit_loop"]["epoch"],
    ]


def test_training_goes_on_and_what_is_saved_is_of_the_step(writer, tmp_path, gate):
    path = tmp_path / "step-00000001"
    assert save_and_change_at_once(writer, path, gate) == [1, 1, 1, 1, 1, 0]


def test_without_the_copy_what_is_saved_would_be_of_later(writer, tmp_path, gate, monkeypatch):
    monkeypatch.setattr(CheckpointDirectory, "_copy", lambda self, name, run: run)
    path = tmp_path / "step-00000001"
    assert save_and_change_at_once(writer, path, gate) == [77, 77, 77, 77, 1, 0]


def test_memory_of_the_copies_is_used_again(writer, tmp_path):
    seen = []
    for step in (1, 2):
        save_as_a_run_does(tmp_path, step, writer=writer)
        writer.wait()
        seen.append({name: copy.data_ptr() for name, copy in writer._copies.items()})
    assert seen[0] == seen[1]
    assert load_weights(tmp_path / "step-00000002")["count"].item() == 2


def test_next_save_waits_for_the_last(writer, tmp_path, gate):
    save_as_a_run_does(tmp_path, 1, writer=writer, keep_last=2)
    second = threading.Thread(
        target=save_as_a_run_does, args=(tmp_path, 2), kwargs={"writer": writer, "keep_last": 2}
    )
    second.start()
    second.join(timeout=0.2)
    assert second.is_alive()
    assert not list(tmp_path.glob(".step-00000002*"))
    gate.set()
    second.join(timeout=30)
    writer.wait()
    for step in (1, 2):
        path = tmp_path / f"step-{step:08d}"
        verify(path)
        assert load_weights(path)["count"].item() == step


def test_save_that_is_not_asynchronous_is_done_when_it_returns(tmp_path):
    save_as_a_run_does(tmp_path, 1)
    assert read_last(tmp_path) == "step-00000001"


@pytest.mark.parametrize("how", ["raise_failure", "wait", "save_checkpoint"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("a bug")])
def test_failure_in_the_thread_surfaces(how, error, writer, tmp_path, monkeypatch):
    save_as_a_run_does(tmp_path, 1)
    before = sorted(tmp_path.rglob("*"))

    def fail(path, entries):
        path.write_bytes(b"some")
        raise error

    monkeypatch.setattr(checkpoint_parts, "write_tensors", fail)
    save_as_a_run_does(tmp_path, 2, writer=writer)
    while not writer._committed.done():
        time.sleep(0.01)
    arguments = (lightning_content(3), tmp_path / "step-00000003") if "save" in how else ()
    named = r"could not be written .*No space .* MiB free .*continues from step-00000001"
    is_named = isinstance(error, OSError)
    with pytest.raises(
        ValueError if is_named else RuntimeError, match=named if is_named else "a b"
    ):
        getattr(writer, how)(*arguments)
    assert sorted(tmp_path.rglob("*")) == before
    verify(tmp_path / "step-00000001")


def test_disk_that_is_full_half_way_is_named(writer, tmp_path):
    save_as_a_run_does(tmp_path, 1)
    before = sorted(tmp_path.rglob("*"))
    content = lightning_content(2)
    content["state_dict"]["large"] = torch.zeros(100_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        writer.save_checkpoint(content, tmp_path / "step-00000002")
        with pytest.raises(ValueError, match=r"File too large.* -> make room .*step-00000001"):
            writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(tmp_path.rglob("*")) == before
    writer.save_checkpoint(content, tmp_path / "step-00000002")
    writer.wait()
    verify(tmp_path / "step-00000002")


def test_directory_that_cannot_be_made_is_named(writer, tmp_path):
    (tmp_path / "runs").write_text("a file where a directory should be")
    writer.save_checkpoint(
        lightning_content(1), tmp_path / "runs" / "checkpoints" / "step-00000001"
    )
    with pytest.raises(ValueError, match=r"could not be written .* MiB free .*from the start"):
        writer.wait()


def test_tensor_that_no_file_can_hold_is_refused_while_it_is_saved(writer, tmp_path):
    content = lightning_content(1)
    content["state_dict"]["odd"] = torch.zeros(2, dtype=torch.complex128)
    with pytest.raises(
        ValueError, match=r"weights/odd is of torch.complex128, which .* -> use one"
    ):
        writer.save_checkpoint(content, tmp_path / "step-00000001")
    assert not list(tmp_path.iterdir())


def test_run_that_ends_by_an_error_lets_its_save_finish(writer, tmp_path, gate):
    save_as_a_run_does(tmp_path, 1, writer=writer)
    threading.Timer(0.1, gate.set).start()
    writer.abandon()
    assert read_last(tmp_path) == "step-00000001"
    verify(tmp_path / "step-00000001")
