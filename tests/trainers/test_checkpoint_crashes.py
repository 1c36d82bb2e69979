"""A process that dies anywhere in a save: what is found then is a whole checkpoint, old or new.

It dies before its n-th change to the file system, for each n until it survives.
"""

import itertools
import json
import os
import shutil
import sys
from functools import partial

import pytest

from tests.trainers.checkpoint_saves import policy, save_as_a_run_does
from trainers import checkpoint_parts, safetensors_file
from trainers.checkpoint import (
    list_checkpoints,
    load_weights,
    open_checkpoint,
    read_last,
    remove_leftovers,
    verify,
)

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate"}
SURVIVED, DIED = 0, 9


def dies_at(number, function):
    """Run a function in a child that dies before change `number`; give whether it did."""
    pid = os.fork()
    if pid == 0:
        count = itertools.count()

        def change():
            if next(count) == number:
                os._exit(DIED)

        def hook(event, arguments):
            is_opened = event == "open" and arguments[1] not in (None, "r", "rb")
            if is_opened or event in CHANGES:
                change()

        write = safetensors_file._write

        def write_in_two(file, content, digest):
            for part in (content[: len(content) // 2], content[len(content) // 2 :]):
                change()
                write(file, part, digest)

        safetensors_file._write = write_in_two
        sys.addaudithook(hook)
        code = 1
        try:
            function()
            code = SURVIVED
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (SURVIVED, DIED), code
    return code == DIED


def value_of(path):
    """Value that all tensors of a checkpoint have; they are of one save, and whole."""
    verify(path)
    stored = open_checkpoint(path)
    state = stored.optimizer_states[0]["state"]["a.weight"]
    values = {
        value for tensor in load_weights(path).values() for value in tensor.flatten().tolist()
    }
    values |= {*state["exp_avg"].whole().flatten().tolist(), state["step"].item()}
    assert len(values) == 1, values
    return values.pop()


def assert_whole(directory, values):
    """All that is listed or pointed to is whole; give the value of `last`."""
    for path in list_checkpoints(directory):
        assert value_of(path) in values
    best = directory / "best"
    if best.exists() and (name := json.loads(best.read_text())["checkpoint"]):
        is_there = (directory / name).is_dir()
        assert is_there or policy(directory)._best_value() == float("inf")  # then the next is best
    return value_of(directory / read_last(directory))


def crash_everywhere(prepared, save, values):
    """Let `save` die at every change; give the values of `last` after each, and after survival."""
    found = []
    for number in range(1000):
        directory = prepared.with_name(str(number))
        shutil.copytree(prepared, directory)
        has_died = dies_at(number, lambda d=directory: save(d))
        found.append(assert_whole(directory, values))
        if not has_died:
            return found
        remove_leftovers(directory)  # and the same command once more
        save(directory)
        assert assert_whole(directory, values) == max(values)
        assert not list(directory.glob(".step-*"))
    raise AssertionError("it never survived")


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "prepared"


def test_death_in_a_save_leaves_the_old_checkpoint_or_the_new(directory):
    save_as_a_run_does(directory, 1, best=0.5)
    save_as_a_run_does(directory, 2)
    save = partial(save_as_a_run_does, step=3, best=0.4)
    found = crash_everywhere(directory, save, {1, 2, 3})
    assert found == sorted(found)
    assert set(found) == {2, 3}
    assert found.count(2) > 15
    assert found.count(3) > 3  # while what is not kept is deleted


def test_death_while_a_checkpoint_is_saved_once_more_leaves_a_whole_one(directory):
    save_as_a_run_does(directory, 1, best=0.5, keep_last=2)
    assert dies_at_pointer(directory)  # between the directory and `last`, and begun again at 1
    assert read_last(directory) == "step-00000001"
    assert value_of(directory / "step-00000002") == 2
    save = partial(save_as_a_run_does, step=2, value=3, best=0.3, keep_last=2)
    assert set(crash_everywhere(directory, save, {1, 2, 3})) == {1, 3}


def dies_at_pointer(directory):
    def save():
        checkpointing = policy(directory, keep_last=2)
        type(checkpointing)._point_to = lambda *args: os._exit(DIED)
        save_as_a_run_does(directory, 2, best=0.4)

    return dies_at(-1, save)


def test_pointers_that_move_first_are_found_out(directory, monkeypatch):
    finish = checkpoint_parts.put_in_place

    def put_in_place(scratch, path):
        (path.parent / "last").write_text(path.name)
        finish(scratch, path)

    monkeypatch.setattr(checkpoint_parts, "put_in_place", put_in_place)
    save_as_a_run_does(directory, 2)
    with pytest.raises(ValueError, match=r"manifest.json is missing"):
        crash_everywhere(directory, partial(save_as_a_run_does, step=3), {2, 3})


def test_checkpoint_that_is_named_before_it_is_whole_is_found_out(directory, monkeypatch):
    def put_in_place(scratch, path):
        path.mkdir(exist_ok=True)
        for file in sorted(scratch.iterdir()):
            file.replace(path / file.name)
        scratch.rmdir()

    monkeypatch.setattr(checkpoint_parts, "put_in_place", put_in_place)
    save_as_a_run_does(directory, 2)
    with pytest.raises(ValueError, match=r"manifest.json is missing"):
        crash_everywhere(directory, partial(save_as_a_run_does, step=3), {2, 3})
