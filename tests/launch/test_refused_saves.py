"""The file system refuses a save: the run ends and says why; the same command goes on."""

import errno
import os
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch import equal

from trainers import checkpoint_writer
from trainers.checkpoint import list_checkpoints, load_weights, verify
from trainers.metrics import read_metrics

SETTINGS = ["max_steps=15", "trainer.val_every_steps=100", "checkpoints.every_steps=5"]


@contextmanager
def no_file_grows_beyond(size):
    """By the system itself: a write takes a part, the next one is refused."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def no_directory_can_be_made():
    """As in a directory that may only be read; root may write everywhere."""

    def refuse(path, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        yield


REFUSALS = {
    "too large": (lambda: no_file_grows_beyond(20_000), "File too large"),
    "read-only": (no_directory_can_be_made, "Read-only file system"),
}


@pytest.fixture(params=REFUSALS)
def refused_second_save(request, monkeypatch):
    """Lets the second save of the first launch be refused; gives how that is said."""
    refusal, message = REFUSALS[request.param]
    write, saves = checkpoint_writer.write_files, []

    def write_files(save, rank, num_ranks):
        saves.append(save.path.name)
        if len(saves) != 2:
            return write(save, rank, num_ranks)
        with refusal():
            return write(save, rank, num_ranks)

    monkeypatch.setattr(checkpoint_writer, "write_files", write_files)
    return message


def test_refused_save_ends_the_run_and_the_same_command_goes_on(
    refused_second_save, small_run, train
):
    settings = [*small_run, *SETTINGS, "run.name=refused"]
    with pytest.raises(ValueError, match=r"could not be written .*-> make room") as error:
        train(*settings)
    run = train(*small_run, *SETTINGS, "run.name=whole")
    path = run.path.with_name("refused")
    refused = type(run)(path)
    assert refused_second_save in str(error.value)
    assert "continues from step-00000005" in str(error.value)
    assert refused.status["state"] == "failed"
    assert str(error.value) in refused.status["reason"]
    assert [each.name for each in list_checkpoints(refused.checkpoints)] == ["step-00000005"]
    assert sorted(each.name for each in refused.checkpoints.iterdir()) == ["last", "step-00000005"]
    verify(refused.find_checkpoint("last"))
    train(*settings)
    one, other = (load_weights(each.find_checkpoint("last")) for each in (run, refused))
    assert all(equal(one[name], other[name]) for name in one)
    rows = [
        [(row["step"], row.get("train/loss")) for row in read_metrics(each.path / "metrics.jsonl")]
        for each in (run, refused)
    ]
    assert rows[0] == rows[1]


def test_refused_start_of_a_continued_run_loses_nothing(small_run, train):
    run = train(*small_run, "max_steps=10")
    before = sorted(path.name for path in run.checkpoints.iterdir())
    rows = read_metrics(run.path / "metrics.jsonl")
    with (
        no_file_grows_beyond(20_000),
        pytest.raises(ValueError, match=r"could not be written .*continues from step-00000010"),
    ):
        train(*small_run, "resume.extend=true")
    assert read_metrics(run.path / "metrics.jsonl")[: len(rows)] == rows
    assert sorted(path.name for path in run.checkpoints.iterdir()) == before
    assert run.status["state"] == "failed"
    assert train(*small_run, "resume.extend=true").summary["step"] == 20
