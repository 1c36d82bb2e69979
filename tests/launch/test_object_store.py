"""Runs in object stores: what is there is whole, whatever happens on the way to it or from it."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from launch.object_store import ObjectStore, StoreError
from tests.launch.failing_store import (
    GONE,
    URL,
    FailingStore,
    Killed,
    MadeUpRun,
    contents,
    num_checkpoints,
    pull,
    push,
    steps,
)
from trainers.checkpoint import list_checkpoints, read_last, verify
from trainers.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("failing_store")


@pytest.fixture
def run(tmp_path):
    return MadeUpRun.begin(tmp_path / "one")


@pytest.mark.parametrize("end", [GONE, Killed()], ids=["failed", "killed"])
def test_upload_that_ends_anywhere_leaves_a_whole_checkpoint(run, tmp_path, end):
    """At every change of the store, in the middle of files too."""
    run.save(10, is_best=True)
    push(run)
    run.save(15)
    run.save(20, is_best=True)
    shutil.rmtree(run.checkpoints / "step-00000010")  # as the run keeps two
    before, found, number = dict(FailingStore.store), set(), -1
    for number in range(100):
        FailingStore.heal()
        FailingStore.store.clear()
        FailingStore.store.update(before)
        (run.path / "store.json").unlink()
        FailingStore.failures[:] = [None] * number
        FailingStore.always = end
        with contextlib.suppress(StoreError, Killed):
            push(run)
            break
        FailingStore.heal()
        other = pull(tmp_path / f"other-{number}")
        last = str(read_last(other.checkpoints))
        step = verify(other.checkpoints / last)["step"]
        assert len(read_metrics(other.path / "metrics.jsonl")) >= step >= other.status["step"]
        best = other.checkpoints / "best"
        assert not best.exists() or verify(
            other.checkpoints / json.loads(best.read_text())["checkpoint"]
        )
        found.add(last)
        push(run)  # the same run again
        assert num_checkpoints(URL) == {"step-00000015": 3, "step-00000020": 3}
    assert 10 < number < 99
    assert found == {"step-00000010", "step-00000020"}


def test_download_that_ends_anywhere_begins_again(run, tmp_path, monkeypatch):
    run.save(10, is_best=True)
    run.save(20)
    push(run)
    get, left = FailingStore.get_file, 0

    def get_half(self, rpath, lpath, **options):
        nonlocal left
        if left == 0:
            Path(lpath).write_bytes(self.cat_file(rpath)[:7])
            raise Killed
        left -= 1
        get(self, rpath, lpath, **options)

    monkeypatch.setattr(FailingStore, "get_file", get_half)
    for number in range(3):
        left = number
        with pytest.raises(Killed):
            pull(tmp_path / "other")
        assert read_last(tmp_path / "other/checkpoints") is None
    left = 9
    other = pull(tmp_path / "other")
    assert [verify(path)["step"] for path in list_checkpoints(other.checkpoints)] == [10, 20]
    assert read_last(other.checkpoints) == "step-00000020"
    assert left == 9 - 2  # what had arrived whole was not fetched again
    assert not list(other.checkpoints.glob(".*"))


def test_failure_that_passes_is_tried_again(run):
    run.save(10)
    FailingStore.failures[:] = [GONE, GONE, None, GONE]
    push(run)
    assert read_last(pull(run.path.with_name("other")).checkpoints) == "step-00000010"


def test_failure_that_stays_names_file_cause_and_what_is_safe(run):
    run.save(10)
    FailingStore.always = GONE
    with pytest.raises(StoreError) as error:
        push(run)
    message = str(error.value)
    assert f"{URL}/checkpoints/step-00000010/weights.safetensors could not be uploaded" in message
    assert "OSError: the network is gone, at attempt 3 of 3" in message
    assert f"whole in {run.path}" in message
    assert message.count(" -> ") == 2


def test_bytes_that_did_not_arrive_are_noticed(run, monkeypatch):
    run.save(10)
    monkeypatch.setattr(FailingStore, "size", lambda self, path: 7)
    with pytest.raises(StoreError, match=r"7 of its \d+ bytes have arrived"):
        push(run)


def test_file_system_shows_no_half_written_pointer(tmp_path, monkeypatch):
    store = ObjectStore(f"file://{tmp_path}/store")
    store.write("last", b"step-00000010\n")
    whole = LocalFileSystem.pipe_file

    def half(self, path, value, **options):
        whole(self, path, value[:5])
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "pipe_file", half)
        with pytest.raises(Killed):
            store.write("last", b"step-00000020\n")
    assert store.read("last") == b"step-00000010\n"
    store.write("last", b"step-00000020\n")
    assert store.read("last") == b"step-00000020\n"


@pytest.mark.parametrize("name", ["weights.safetensors", "state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_file_is_named_and_the_older_one_offered(run, tmp_path, name, damage):
    run.save(10, is_best=True)
    run.save(20)
    push(run)
    key = f"/bucket/runs/one/checkpoints/step-00000020/{name}"
    content = bytearray(contents(URL)[key.removeprefix("/bucket/runs/one/")])
    content[len(content) // 2] ^= 1
    if damage == "remove":
        del FailingStore.store[key]
    else:
        FailingStore(skip_instance_cache=True).pipe_file(
            key, bytes(content[:-1] if damage == "cut" else content)
        )
    with pytest.raises(ValueError, match=rf"{URL}/checkpoints/step-00000020 {name}.*") as error:
        pull(tmp_path / "other")
    assert str(error.value).endswith("the one before it is there: checkpoint=step-00000010")
    other = pull(tmp_path / "other", "step-00000010")
    assert steps(other) == [10]
    other.go_back_to("step-00000010")
    push(other)
    assert read_last(pull(tmp_path / "third").checkpoints) == "step-00000010"


def test_newer_format_names_the_version_that_wrote_it(run, tmp_path):
    path = run.save(10) / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"format": 99, "versions": {"trainyard": "9.9"}}))
    push(run)
    with pytest.raises(ValueError, match=r"step-00000010 -> written by trainyard 9.9 in format 99"):
        pull(tmp_path / "other")


def test_damaged_best_does_not_end_the_run(run, tmp_path):
    run.save(10, is_best=True)
    run.save(20)
    push(run)
    del FailingStore.store["/bucket/runs/one/checkpoints/step-00000010/state.pt"]
    with pytest.raises(ValueError, match=r"step-00000010 state.pt is missing .* delete (.*)/best"):
        pull(tmp_path / "other")
    del FailingStore.store["/bucket/runs/one/checkpoints/best"]
    assert steps(pull(tmp_path / "other")) == [20]


def test_unknown_checkpoint_is_told_those_that_are_there(run, tmp_path):
    run.save(10)
    push(run)
    with pytest.raises(ValueError, match=r"step-7 -> .* use one of last, best, step-00000010"):
        pull(tmp_path / "other", "step-7")
