"""One checkpoint by several ranks, which are threads here."""

import threading
import time

import pytest
import torch

from tests.trainers.checkpoint_saves import at_once, held_by, ranks, save_as_a_run_does
from trainers import checkpoint_parts, checkpoint_writer, durable_files
from trainers.checkpoint import load_weights, open_checkpoint, read_last, verify
from trainers.checkpoint_parts import merge
from trainers.checkpoint_writer import GivenUpError
from trainers.stored_tensors import Run


def save_on(writers, path, step=1):
    """Save on all ranks at once; gives what each raised."""
    number = len(writers)
    return at_once(
        [
            lambda w=writer, r=rank: w.save_checkpoint(held_by(r, number, step), path)
            for rank, writer in enumerate(writers)
        ]
    )


def assert_is_of(path, num_ranks, step=1):
    manifest = verify(path)
    assert manifest["world_size"] == num_ranks
    found = load_weights(path)
    assert torch.equal(found["a.weight"], torch.full((3, 4), float(step)))
    assert found["tied"].data_ptr() == found["a.weight"].data_ptr()
    assert found["sharded"].tolist() == [[float(rank)] * 5 for rank in range(num_ranks)]
    stored = open_checkpoint(path)
    assert stored.weights["sharded"].run(3, 7).tolist() == [0, 0, 1, 1]
    state = stored.optimizer_states[0]["state"]["a.weight"]
    assert torch.equal(state["exp_avg"].whole(), found["a.weight"])


@pytest.mark.parametrize("num_ranks", [2, 5])
def test_all_ranks_write_and_each_knows_when_it_is_done(num_ranks, tmp_path):
    path = tmp_path / "step-00000001"
    there = []
    writers = ranks(num_ranks)

    def save(rank):
        writers[rank].save_checkpoint(held_by(rank, num_ranks, 1), path)
        there.append(path.exists())

    assert at_once([lambda r=rank: save(r) for rank in range(num_ranks)]) == [None] * num_ranks
    assert there == [True] * num_ranks
    assert_is_of(path, num_ranks)
    names = {f"weights-{r + 1:05d}-of-{num_ranks:05d}.safetensors" for r in range(num_ranks)}
    assert names <= {file.name for file in path.iterdir()}
    assert not list(path.glob("rank-*"))


def test_wait_is_for_the_slowest_rank(tmp_path, monkeypatch):
    write = checkpoint_parts.write_tensors

    gate = threading.Event()

    def slow_on_rank_1(path, entries):
        if "-00002-of-" in path.name:
            assert gate.wait(timeout=30)
        return write(path, entries)

    monkeypatch.setattr(checkpoint_parts, "write_tensors", slow_on_rank_1)
    path, writers = tmp_path / "step-00000001", ranks(3, asynchronous=True)
    assert save_on(writers, path) == [None] * 3
    assert not path.exists()
    threading.Timer(0.2, gate.set).start()
    assert at_once([lambda w=w: (w.wait(), path.exists())[1] for w in writers]) == [True] * 3
    assert_is_of(path, 3)


def test_files_of_another_rank_that_do_not_appear_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "GRACE_S", 0.1)
    read = checkpoint_writer.read_part
    monkeypatch.setattr(
        checkpoint_writer, "read_part", lambda path, rank: None if rank == 1 else read(path, rank)
    )
    path, writers = tmp_path / "step-00000001", ranks(2)
    writers[0].barrier = writers[1].barrier = threading.Barrier(2)
    original = writers[1]._barrier
    calls = []

    def barrier():  # rank 0 fails before the second; another rank would be ended with it
        calls.append(1)
        if len(calls) == 1:
            original()

    writers[1]._barrier = barrier
    failure, _ = save_on(writers, path)
    assert isinstance(failure, ValueError)
    for part in (
        "could not be written",
        "what rank 1 wrote has not appeared in",
        "all nodes share",
    ):
        assert part in str(failure)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("token", ["another launch", "launch"])
def test_files_of_another_launch_are_not_taken(token, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "GRACE_S", 0.1)
    path = tmp_path / "step-00000001"
    killed = ranks(2, token=token)[1]
    killed._start(save_of(killed, path))
    killed._written.result()  # pyright: ignore[reportOptionalMemberAccess]
    writer = ranks(2)[0]
    writer._barrier = lambda: None
    if token == "launch":  # what would happen if tokens were the same
        writer.save_checkpoint(held_by(0, 2, 1), path)
        assert_is_of(path, 2)
        return
    with pytest.raises(ValueError, match=r"what rank 1 wrote has not appeared"):
        writer.save_checkpoint(held_by(0, 2, 1), path)
    assert not path.exists()
    assert len(list(tmp_path.iterdir())) == 1  # is removed when training starts


def save_of(writer, path):
    runs, aliases, _ = checkpoint_parts.flatten(held_by(writer.rank, writer.num_ranks, 1))
    scratch = path.with_name(f".{path.name}.{writer.token}.partial")
    return checkpoint_parts.Save(path, scratch, runs, aliases, b"", 1)


@pytest.mark.parametrize("full", [0, 1])
def test_rank_whose_disk_is_full_fails_and_nothing_is_moved(full, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "GRACE_S", 0.1)
    save_as_a_run_does(tmp_path, 1)
    write = checkpoint_parts.write_tensors
    has_begun, has_failed = threading.Event(), threading.Event()

    def full_on_one_rank(path, entries):
        if f"-0000{full + 1}-of-" in path.name:
            path.write_bytes(b"some")
            has_begun.wait(timeout=30)
            has_failed.set()
            raise OSError(28, "No space left on device")
        has_begun.set()
        has_failed.wait(timeout=30)
        while full == 0 and path.parent.exists():  # rank 0 clears it away
            time.sleep(0.01)
        return write(path, entries)

    monkeypatch.setattr(checkpoint_parts, "write_tensors", full_on_one_rank)
    writers = ranks(2, asynchronous=True)
    assert save_on(writers, tmp_path / "step-00000002", 2) == [None, None]
    with pytest.raises(ValueError, match=r"No space .*continues from step-00000001"):
        writers[full].wait()
    writers[1].abandon()
    if full == 0:
        with pytest.raises(GivenUpError, match="rank 0 has given it up"):
            writers[1].wait()
    else:
        writers[0].abandon()
        with pytest.raises(ValueError, match="what rank 1 wrote has not appeared"):
            writers[0].raise_failure()
    assert read_last(tmp_path) == "step-00000001"
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["step-00000001"]


def test_directory_moves_when_no_rank_works_in_it_any_more(tmp_path, monkeypatch):
    sync, write, slow_threads = durable_files.sync_directory, checkpoint_parts.write_files, []

    def write_slowly(save, rank, num_ranks):
        slow_threads.extend([threading.get_ident()] * rank)
        write(save, rank, num_ranks)

    def sync_slowly(path):
        time.sleep(0.3 if threading.get_ident() in slow_threads else 0)
        sync(path)

    monkeypatch.setattr(checkpoint_writer, "write_files", write_slowly)
    for module in (durable_files, checkpoint_parts):
        monkeypatch.setattr(module, "sync_directory", sync_slowly)
    assert save_on(ranks(2), tmp_path / "step-00000001") == [None, None]
    assert_is_of(tmp_path / "step-00000001", 2)


# -- what ranks wrote, put together -------------------------------------------------------------


def part(*pieces, shape=(12,)):
    return {"tensors": {"x": {"dtype": "F32", "shape": list(shape), "pieces": [*pieces]}}}


def test_pieces_of_ranks_are_put_in_order():
    found = merge([part([0, 8, 12]), part(), part([2, 0, 3], [2, 3, 8])])
    assert found["x"]["pieces"] == [[2, 0, 3], [2, 3, 8], [0, 8, 12]]
    assert merge([part(shape=(0, 4)), part(shape=(0, 4))])["x"]["pieces"] == []


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([part([0, 0, 4]), part([1, 5, 12])], "x -> elements 4 to 5 were not saved once"),
        ([part([0, 0, 4]), part([1, 3, 12])], "x -> elements 4 to 3 were not saved once"),
        ([part([0, 0, 12]), part([1, 0, 12])], "x -> elements 12 to 0 were not saved once"),
        ([part([0, 0, 4]), part([1, 4, 11])], "x -> elements from 11 on were not saved"),
        ([part([0, 0, 4]), part([1, 4, 13])], "x -> elements from 13 on were not saved"),
        ([part(), part()], "x -> elements from 0 on were not saved"),
    ],
)
def test_gaps_and_overlaps_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        merge(parts)


def test_save_in_which_ranks_overlap_leaves_nothing(tmp_path):
    content = held_by(0, 1, 1)
    content["state_dict"]["half"] = Run(torch.Size([8]), 0, torch.zeros(4))
    with pytest.raises(ValueError, match="weights/half -> elements from 4 on were not saved"):
        ranks(1)[0].save_checkpoint(content, tmp_path / "step-00000001")
    assert not list(tmp_path.iterdir())
