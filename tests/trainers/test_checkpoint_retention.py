"""Which checkpoints are kept."""

import json

import pytest

from tests.trainers.checkpoint_saves import policy, save_as_a_run_does
from trainers.checkpoint import list_checkpoints, read_last, size_of


def saved(directory, steps, bests=(), **settings):
    for step in steps:
        save_as_a_run_does(directory, step, best=1 / step if step in bests else None, **settings)
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(directory)]


@pytest.mark.parametrize(
    ("settings", "bests", "kept"),
    [
        ({"keep_last": 1}, (), [6]),
        ({"keep_last": 3}, (), [4, 5, 6]),
        ({"keep_last": 1}, (2,), [2, 6]),
        ({"keep_last": 1}, (2, 4), [4, 6]),
        ({"keep_last": 1, "keep_every_steps": 2}, (), [2, 4, 6]),
        ({"keep_last": 1, "keep_every_steps": 4}, (1,), [1, 4, 6]),
    ],
)
def test_what_is_kept(settings, bests, kept, tmp_path):
    assert saved(tmp_path, range(1, 7), bests, **settings) == kept
    assert read_last(tmp_path) == "step-00000006"
    if bests:
        best = json.loads((tmp_path / "best").read_text())
        assert best == {
            "checkpoint": f"step-{max(bests):08d}",
            "metric": "val/loss",
            "value": 1 / max(bests),
        }


@pytest.mark.parametrize(
    ("room", "bests", "kept"),
    [
        (9.9, (), [1, 2, 3, 4, 5, 6]),
        (3.5, (), [4, 5, 6]),
        (3.5, (1,), [1, 5, 6]),
        (1.5, (1,), [1, 6]),  # never the newest nor the best
        (0.1, (), [6]),
    ],
)
def test_room_for_all_is_limited(room, bests, kept, tmp_path):
    save_as_a_run_does(tmp_path / "one", 1)
    one = size_of(tmp_path / "one" / "step-00000001")
    settings = {"keep_last": 9, "keep_every_steps": 2, "max_gib": room * one / 2**30}
    assert saved(tmp_path / "run", range(1, 7), bests, **settings) == kept


def test_newest_is_kept_where_its_step_is_not_the_highest(tmp_path):
    assert saved(tmp_path, [5, 6], keep_last=2) == [5, 6]
    assert saved(tmp_path, [3], keep_last=2) == [3, 5, 6]
    assert read_last(tmp_path) == "step-00000003"


def test_directories_of_other_names_are_left_alone(tmp_path):
    for name in ("step-00000001.copy", "step-best", "abandoned"):
        (tmp_path / name).mkdir()
    assert saved(tmp_path, [1, 2], keep_last=1) == [2]
    names = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert names == {"step-00000001.copy", "step-best", "abandoned", "step-00000002"}


def test_best_that_is_gone_is_none(tmp_path):
    saved(tmp_path, [1], bests=[1])
    assert policy(tmp_path)._best_value() == 1.0
    (tmp_path / "step-00000001").rename(tmp_path / "elsewhere")
    assert policy(tmp_path)._best_value() == float("inf")
