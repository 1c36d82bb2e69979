"""Runs in object stores: when they are uploaded, and which side is continued."""

import json
import shutil
import threading

import pytest

from benchmarks.cells import start_ranks
from launch.object_store import ObjectStore
from launch.stored_files import is_store_ahead
from launch.uploads import Uploads
from tests.launch.failing_store import (
    GONE,
    URL,
    FailingStore,
    MadeUpRun,
    contents,
    num_checkpoints,
    pull,
    push,
    steps,
)
from trainers.checkpoint import read_last

pytestmark = pytest.mark.usefixtures("failing_store")


@pytest.fixture
def run(tmp_path):
    return MadeUpRun.begin(tmp_path / "one")


@pytest.mark.parametrize(
    ("theirs", "ours", "synced", "is_ahead"),
    [
        (None, None, None, False),
        (None, "step-10", None, False),
        ("step-10", None, "step-10", True),  # the disk was emptied
        ("step-10", "step-10", None, False),
        ("step-10", "step-20", "step-10", False),  # trained here since
        ("step-20", "step-10", "step-20", False),  # went back here since
        ("step-20", "step-10", "step-10", True),  # trained elsewhere since
        ("step-10", "step-20", "step-20", True),  # went back elsewhere since
        ("step-30", "step-20", "step-10", True),  # both
        ("step-20", "step-30", "step-10", False),
        ("step-20", "step-10", None, True),  # never together
    ],
)
def test_side_that_has_moved_is_ahead(theirs, ours, synced, is_ahead):
    assert is_store_ahead(theirs, ours, synced) == is_ahead


def test_going_back_reaches_other_disks_and_is_no_progress_lost(run, tmp_path):
    for step in (10, 20, 30):
        run.save(step)
    push(run)
    other = pull(tmp_path / "other")
    run.go_back_to("step-00000010")
    pull(run.path)  # nothing: this disk is ahead
    assert read_last(run.checkpoints) == "step-00000010"
    push(run)
    assert num_checkpoints(URL) == {"step-00000010": 3}
    assert "checkpoints/abandoned/step-00000030/manifest.json" in contents(URL)
    pull(other.path)
    assert steps(other) == [10]
    assert (other.checkpoints / "went_back").exists()
    assert (other.checkpoints / "abandoned/step-00000030").is_dir()


def test_both_sides_going_on_the_longer_one_is_taken(run, tmp_path):
    run.save(10)
    push(run)
    other = MadeUpRun(pull(tmp_path / "other").path)
    run.save(20)
    push(run)
    other.save(30)
    pull(other.path)
    assert read_last(other.checkpoints) == "step-00000030"
    push(other)
    pull(run.path)
    assert read_last(run.checkpoints) == "step-00000030"


def test_another_run_of_that_name_is_refused(run, tmp_path):
    run.save(10)
    push(run)
    other = MadeUpRun.begin(tmp_path / "other")
    (other.path / "config.yaml").write_text("seed: 2\n")
    other.save(30)
    with pytest.raises(ValueError, match=r"(?s)are two runs:.*seed: .*choose another run.name"):
        pull(other.path)


def test_store_keeps_what_the_policy_keeps(tmp_path):
    run = MadeUpRun.begin(tmp_path / "one", keep_last=2, keep_every_steps=20)
    for step in (10, 20, 30):
        run.save(step, is_best=step == 10)
        push(run)
    other = MadeUpRun(pull(tmp_path / "other").path)
    assert steps(other) == [10, 30]  # the others stay where they are
    for step in (40, 50, 60):
        other.save(step)
        push(other)
    kept = {"step-00000010", "step-00000020", "step-00000040", "step-00000050", "step-00000060"}
    assert num_checkpoints(URL).keys() == kept


def test_checkpoint_deleted_while_it_is_uploaded_arrives_whole(run, tmp_path, monkeypatch):
    begun, may_go_on = threading.Event(), threading.Event()
    put = FailingStore.put_file

    def slow(self, lpath, rpath, **options):
        begun.set()
        may_go_on.wait(30)
        put(self, lpath, rpath, **options)

    monkeypatch.setattr(FailingStore, "put_file", slow)
    uploads = Uploads(run, ObjectStore(URL))
    with uploads.running():
        uploads.on_commit(run.save(10))
        assert begun.wait(30)
        uploads.on_commit(run.save(20))
        shutil.rmtree(run.checkpoints / "step-00000010")
        uploads.on_commit(run.save(30))
        may_go_on.set()
    # The first whole one came from links; of those that came meanwhile the newest was first.
    manifests = [path for path in FailingStore.changes if path.endswith("manifest.json")]
    order = [path.split("/")[-2] for path in dict.fromkeys(manifests)]
    assert order == ["step-00000010", "step-00000030", "step-00000020"]
    assert steps(pull(tmp_path / "other")) == [30]
    assert not (run.path / ".uploading").exists()


def test_store_never_says_more_than_it_has(run, monkeypatch):
    """A run that ends while an older checkpoint is uploaded is not done there before the last."""
    put = FailingStore.put_file

    def slow(self, lpath, rpath, **options):
        if "step-00000010" in rpath and run.status["state"] == "running":
            run.save(20)
            run.write_status("done")
        put(self, lpath, rpath, **options)

    monkeypatch.setattr(FailingStore, "put_file", slow)
    run.write_status("running")
    run.save(10)
    uploads, store = Uploads(run, ObjectStore(URL)), ObjectStore(URL)
    for last, state in ((10, "running"), (20, "done")):
        uploads.push()
        assert store.read("checkpoints/last") == f"step-{last:08d}\n".encode()
        assert json.loads(store.read("status.json"))["state"] == state


def test_store_is_not_told_of_an_end_whose_checkpoint_was_not_there_yet(run, monkeypatch):
    hold = Uploads._hold_newest

    def hold_just_before_the_end(self):
        held = hold(self)
        run.save(20)
        run.write_status("done")
        return held

    run.write_status("running")
    store = ObjectStore(URL)
    with monkeypatch.context() as patch:
        patch.setattr(Uploads, "_hold_newest", hold_just_before_the_end)
        Uploads(run, store).push()
    assert json.loads(store.read("status.json"))["state"] == "running"
    Uploads(run, store).push()
    assert json.loads(store.read("status.json"))["state"] == "done"


def test_failed_upload_is_told_of_and_made_up_for_by_the_next(run, capfd):
    uploads = Uploads(run, ObjectStore(URL))
    FailingStore.always = GONE
    with uploads.running():
        uploads.on_commit(run.save(10))
    printed = capfd.readouterr().err
    assert "warning: not uploaded" in printed
    assert "the network is gone" in printed
    FailingStore.heal()
    with uploads.running():
        uploads.on_commit(run.save(20))
    assert num_checkpoints(URL) == {"step-00000010": 3, "step-00000020": 3}
    assert capfd.readouterr().err == ""


def test_two_writers_are_told_of_each_other(run, tmp_path, capfd):
    run.save(10)
    uploads = Uploads(run, ObjectStore(URL))
    uploads.push()
    other = MadeUpRun(pull(tmp_path / "other").path)
    other.save(20)
    push(other)
    run.save(30)
    uploads.push()
    assert "step-00000020, which this process has not written" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "left"),
    [("long", {"trained", "done"}), ("failed", {"failed"})],
)
def test_ranks_wait_for_rank_zero_however_long_it_uploads(tmp_path, case, left):
    start_ranks("tests.launch.upload_ranks", [str(tmp_path), case], 2)
    names = {path.name for path in tmp_path.iterdir()} - {"given_up"}
    assert names == {f"{rank}.{what}" for rank in range(2) for what in left}
