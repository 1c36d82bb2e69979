"""The benchmark of what saves cost, at the smallest size."""

import sys

import pytest

from benchmarks import checkpoint_stalls


@pytest.mark.slow
def test_stalls_are_measured_of_both_kinds_of_save(monkeypatch, capsys):
    size = ["saves=1", "steps=2", "layers=1", "width=64", "samples=2", "tokens=16"]
    monkeypatch.setattr(sys, "argv", ["stalls", "launches=single@1", *size])
    checkpoint_stalls.main()
    printed = capsys.readouterr().out
    assert "asynchronous" in printed
    assert "synchronous" in printed
    assert "%" in printed
