"""Which pairs are samples: groups against a plain planner, and pairs that are too long."""

from collections import Counter
from collections.abc import Callable
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest

from datamodules import pair_plan
from datamodules.index import Index
from tests.datamodules.pair_shards import (
    BUDGET,
    END,
    PAIRS,
    SHARDS,
    TARGET_END,
    Pair,
    draw_pairs,
    groups_of,
    make_rows,
    write_pairs,
)

BOUNDS = [0, 43, 86, 130, 131, 173, 215, 257, 300]
"""Windows of at most 50 pairs of one shard, of about equal size."""


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "train", PAIRS, SHARDS)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_plan, "WINDOW_PAIRS", 50)


def plain_groups(pairs: list[Pair]) -> list[list[tuple[int, int]]]:
    """Lengths of the groups of a window, cut from the sorted pairs as the docstring says."""
    lengths = sorted(
        ((len(source), len(target)) for source, target in pairs),
        key=lambda pair: (max(pair), pair[1] - pair[0]),
    )
    groups: list[list[tuple[int, int]]] = [[]]
    for pair in lengths:
        longer = [*groups[-1], pair]
        if (max(s for s, _ in longer) + max(t for _, t in longer)) * len(longer) > BUDGET:
            groups.append([])
        groups[-1].append(pair)
    return groups


def test_groups_are_those_of_a_plain_planner_within_the_budget(index: Index) -> None:
    rows = make_rows(index, group_tokens=BUDGET)
    windows = [PAIRS[a:b] for a, b in pairwise(BOUNDS)]
    expected = [group for window in windows for group in plain_groups(window)]
    for epoch in range(2):
        groups = groups_of(rows, epoch)
        lengths = [[(len(source), len(target)) for source, target in own] for own in groups]
        assert [sorted(own) for own in lengths] == [sorted(own) for own in expected]
        for own in lengths:
            padded = (max(s for s, _ in own) + max(t for _, t in own)) * len(own)
            assert padded <= BUDGET


def test_pairs_of_equal_lengths_change_groups_with_the_epoch_and_the_seed(
    tmp_path: Path,
) -> None:
    same = [(tuple([10 + n] * 4 + [END]), tuple([10 + n] * 4 + [TARGET_END])) for n in range(40)]
    index = write_pairs(tmp_path / "train", same, [40])

    def groups(epoch: int, seed: int) -> list[frozenset[Pair]]:
        rows = make_rows(index, group_tokens=100, seed=seed)
        return [frozenset(group) for group in groups_of(rows, epoch)]

    assert [len(group) for group in groups(0, 3)] == [10] * 4
    assert groups(0, 3) == groups(0, 3)
    assert groups(0, 3) != groups(1, 3)
    assert groups(0, 3) != groups(0, 4)


def fill(groups: list[list[Pair]]) -> float:
    """Share of real tokens when each group is padded by itself."""
    lengths = [np.array([(len(source), len(target)) for source, target in g]) for g in groups]
    return sum(own.sum() for own in lengths) / sum(own.max(0).sum() * len(own) for own in lengths)


def test_groups_are_nine_tenths_full_where_pairs_as_they_come_are_half_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair_plan, "WINDOW_PAIRS", 8192)
    pairs = draw_pairs(8192, longest=100)
    index = write_pairs(tmp_path / "train", pairs, [8192], chunk_tokens=5000)
    groups = groups_of(make_rows(index, group_tokens=2048, **LIMITS), 0)
    assert fill(groups) > 0.9  # 0.95
    size = len(pairs) // len(groups)
    assert fill([pairs[n : n + size] for n in range(0, len(pairs), size)]) < 0.5


LIMITS = {"max_source_tokens": 100, "max_target_tokens": 100}


def test_long_pairs_are_named_dropped_or_cut(index: Index) -> None:
    long = [n for n, (source, _) in enumerate(PAIRS) if len(source) > 20]
    longest = max(range(len(PAIRS)), key=lambda n: len(PAIRS[n][0]))
    message = (
        rf"datamodule.max_source_tokens=20 -> {len(long)} of 300 pairs .* the longest of "
        rf"{len(PAIRS[longest][0])} tokens .*\(pair {longest}\) -> raise it"
    )
    with pytest.raises(ValueError, match=message):
        make_rows(index, max_source_tokens=20)
    for group_tokens in (None, BUDGET):
        limits = {"max_source_tokens": 20, "max_target_tokens": 18, "group_tokens": group_tokens}
        dropped = make_rows(index, longer="drop", **limits)
        kept = [pair for pair in PAIRS if len(pair[0]) <= 20 and len(pair[1]) <= 18]
        assert dropped._plan.num_dropped == 300 - len(kept) > 20
        assert Counter(chain(*groups_of(dropped, 0))) == Counter(kept)
        cut = make_rows(index, longer="cut", **limits)
        expected = [((*s[:-1][:19], END), (*t[:-1][:17], TARGET_END)) for s, t in PAIRS]
        assert Counter(chain(*groups_of(cut, 0))) == Counter(expected)
    with pytest.raises(ValueError, match=r"datamodule.longer=drop -> every pair of"):
        make_rows(index, longer="drop", max_source_tokens=1)


def test_group_that_has_no_room_for_the_longest_pair_is_refused(index: Index) -> None:
    longest = max(len(source) + len(target) for source, target in PAIRS)
    make_rows(index, group_tokens=longest)
    message = rf"datamodule.group_tokens={longest - 1} -> the longest pair alone has {longest} tok"
    with pytest.raises(ValueError, match=message):
        make_rows(index, group_tokens=longest - 1)


def test_documents_that_are_no_pairs_are_refused(
    index: Index, make_dataset: Callable[..., Index], tmp_path: Path
) -> None:
    odd = make_dataset(tmp_path / "train", [[90]], document_tokens=30)
    with pytest.raises(ValueError, match=r"3 documents in a shard are no pairs"):
        make_rows(odd)


def test_window_expects_the_chunks_that_its_pairs_lie_in(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks_of, first_chunk = [], 0  # of each pair
    for shard, size in enumerate(SHARDS):
        first = sum(SHARDS[:shard])
        place = 0
        for source, target in PAIRS[first : first + size]:
            stop = place + len(source) + len(target)
            chunks_of.append(range(first_chunk + place // 97, first_chunk + (stop - 1) // 97 + 1))
            place = stop
        first_chunk += -(-place // 97)
    rows, expected = make_rows(index), []
    monkeypatch.setattr(rows._chunks.reader, "expect", lambda own: expected.append(own.tolist()))
    rows.expect(np.array([6, 1, 6, 3]))
    assert expected == [
        sorted(set(chain(*chunks_of[BOUNDS[window] : BOUNDS[window + 1]]))) for window in (6, 1, 3)
    ]
