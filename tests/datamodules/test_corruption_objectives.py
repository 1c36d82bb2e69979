"""Objectives: against the paper's rules in plain Python, and the rows that went in."""

import itertools
from collections import Counter

import numpy as np
import pytest

from datamodules.corruption import PrefixLM, SpanCorruption, count_noise, lengths_for
from datamodules.order import splitmix64
from tests.datamodules.spans import END, SENTINELS, make_corruption, reassemble

L = 40


def make_keys(count: int) -> np.ndarray:
    return splitmix64(np.arange(count, dtype=np.uint64))


def plain_corruption(row: list[int], is_noise: list[bool]) -> tuple[list[int], list[int]]:
    """Section 3.1.4 in words: a span becomes one sentinel; the target spells the spans out."""
    source, target, number = [], [], -1
    for place, (token, noise) in enumerate(zip(row, is_noise, strict=True)):
        if noise and not (place and is_noise[place - 1]):
            number += 1
            source.append(SENTINELS[number])
            target.append(SENTINELS[number])
        (target if noise else source).append(token)
    return [*source, END], [*target, END]


@pytest.mark.parametrize(
    ("row_length", "density", "mean_span"),
    [(568, 0.15, 3), (40, 0.15, 3), (64, 0.5, 1), (13, 0.9, 2), (2, 0.15, 3), (30, 0.3, 100)],
)
def test_span_corruption_equals_the_paper_in_plain_python(
    row_length: int, density: float, mean_span: float
) -> None:
    rows = np.random.default_rng(0).integers(0, 60_000, (50, row_length))
    objective, keys = make_corruption(row_length, density, mean_span), make_keys(50)
    made, noise = objective.corrupt(rows, keys), objective.find_noise(keys)
    num_noise, num_spans = count_noise(row_length, density, mean_span)
    assert (noise.sum(1) == num_noise).all()
    begins = noise & ~np.pad(noise, ((0, 0), (1, 0)))[:, :-1]
    assert (begins.sum(1) == num_spans).all()
    assert not noise[:, 0].any()
    assert noise[:, -1].all()
    for n in range(50):
        source, target = made.source[n].tolist(), made.target[n].tolist()
        assert (source, target) == plain_corruption(rows[n].tolist(), noise[n].tolist())
        assert reassemble(source, target) == rows[n].tolist()
    assert (made.source_lengths == made.source.shape[1]).all()
    assert (objective.count_targets(keys) == made.target.shape[1]).all()


def test_every_corruption_of_a_row_is_as_likely() -> None:
    objective = make_corruption(10, density=0.4, mean_span=2)  # 4 tokens in 2 spans
    num_keys = 30_000
    found = Counter(map(tuple, objective.find_noise(make_keys(num_keys)).tolist()))
    expected = set()
    for text, span in itertools.product(range(1, 6), range(1, 4)):
        lengths = [text, span, 6 - text, 4 - span]
        expected.add(tuple(bool(n % 2) for n, length in enumerate(lengths) for _ in range(length)))
    assert found.keys() == expected
    mean = num_keys / len(expected)
    assert all(abs(count - mean) < 5 * mean**0.5 for count in found.values())


def test_lengths_are_those_of_t5() -> None:
    assert lengths_for(512, 0.15, 3) == (568, 114)
    assert count_noise(568, 0.15, 3) == (85, 28)
    for arguments in itertools.product((3, 20, 333), (0.15, 0.3, 0.5), (3, 3.5)):
        row_length, target_length = lengths_for(*arguments)
        made = make_corruption(row_length, *arguments[1:]).corrupt(
            np.zeros((1, row_length), np.int64), make_keys(1)
        )
        longer = count_noise(row_length + 1, *arguments[1:])
        assert made.source.shape[1] == arguments[0]
        assert made.target.shape[1] == target_length
        assert row_length + 1 - longer[0] + longer[1] + 1 > arguments[0]
    for arguments, message in (
        ((2, 0.15, 3), "source_length=2 -> a token, a sentinel and an end token are 3"),
        ((512, 1.0, 3), "noise_density=1.0 -> "),
        ((512, 0.15, 0.5), "mean_span_length=0.5 -> "),
    ):
        with pytest.raises(ValueError, match=message):
            lengths_for(*arguments)


def test_too_few_sentinels_are_refused_with_the_number_it_takes() -> None:
    message = r"corpus.num_sentinels=27 -> .* 568 tokens.* 28 spans -> set corpus.num_sentinels=28"
    with pytest.raises(ValueError, match=message):
        SpanCorruption(568, density=0.15, mean_span=3, sentinels=[*range(27)], end_token=END)


def test_prefixes_are_of_every_length_and_their_rest_is_the_target() -> None:
    objective, keys = PrefixLM(L, end_token=END), make_keys(20_000)
    rows = np.tile(np.arange(L), (len(keys), 1)) + 100 * (np.arange(len(keys)) % 600)[:, None]
    made = objective.corrupt(rows, keys)
    assert (objective.count_targets(keys) == made.target_lengths).all()
    for row, source, length, target, target_length in zip(rows.tolist(), *made, strict=True):
        source, target = source[:length].tolist(), target[:target_length].tolist()
        assert source[-1] == target[-1] == END
        assert source[:-1] + target[:-1] == row
        assert len(source) > 1
        assert len(target) > 1
    counts = Counter((made.source_lengths - 1).tolist())
    assert sorted(counts) == [*range(1, L)]
    mean = len(keys) / (L - 1)
    assert all(abs(count - mean) < 5 * mean**0.5 for count in counts.values())
