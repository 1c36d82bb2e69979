import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.batch import IGNORED
from datamodules.index import Index
from datamodules.rows import TextRows

LENGTHS = [[1000, 70, 64], [900, 65]]
FIRSTS = [0, 1000, 1070, 1134, 2034]


def make_rows(index: Index, **settings: object) -> TextRows:
    defaults = {"sequence_length": 64, "document_mask": False, "seed": 1}
    return TextRows(index, **{**defaults, **settings})  # pyright: ignore[reportArgumentType]


@pytest.fixture
def index(make_dataset: Callable[..., Index], tmp_path: Path) -> Index:
    return make_dataset(tmp_path / "train", LENGTHS, ends=[3, 10, 63, 64, 127])


def read(rows: TextRows, epoch: int | None, places: list[tuple[int, int]]) -> dict:
    blocks, samples = np.array(places).T
    epochs = None if epoch is None else np.full(len(blocks), epoch)
    (batch,) = rows.batches(rows.plan(epochs, blocks, samples)[None])
    return {**batch}


def test_rows_are_counted_by_chunk(index: Index) -> None:
    assert make_rows(index).samples_per_block.tolist() == [15, 1, 0, 14, 1]


def test_evaluation_rows_are_consecutive_slices(index: Index) -> None:
    places = [(4, 0), (0, 14), (0, 0), (3, 2)]
    batch = read(make_rows(index), None, places)
    for row, (chunk, k) in enumerate(places):
        first = FIRSTS[chunk] + k * 64
        assert batch["inputs"][row].tolist() == list(range(first, first + 64))
        assert batch["targets"][row].tolist() == list(range(first + 1, first + 65))
    assert batch["inputs"].dtype == batch["targets"].dtype == torch.int64
    assert "documents" not in batch


def test_training_rows_begin_elsewhere_in_each_epoch(index: Index) -> None:
    rows, phases = make_rows(index), set()
    for epoch in range(50):
        inputs = read(rows, epoch, [(0, 0), (0, 14), (4, 0)])["inputs"]
        phase = int(inputs[0, 0])
        assert inputs[1, 0] == phase + 14 * 64  # one phase for all rows of a chunk
        assert inputs[2, 0] == FIRSTS[4]  # nothing is left over there
        phases.add(phase)
    assert phases <= set(range(40))  # 1000 - 1 - 15 * 64 tokens are left over
    assert len(phases) > 20
    again = [int(read(make_rows(index), epoch, [(0, 0)])["inputs"][0, 0]) for epoch in range(3)]
    assert again == [int(read(rows, epoch, [(0, 0)])["inputs"][0, 0]) for epoch in range(3)]


def test_padding_rows_predict_nothing(index: Index) -> None:
    rows = make_rows(index)
    (batch,) = rows.batches(rows.plan(None, np.array([0, 0]), np.array([0, 0]))[None])
    rows.pad(batch, 2)
    assert (batch["targets"] == batch["inputs"] + 1).all()
    rows.pad(batch, 1)
    assert (batch["targets"][0] == batch["inputs"][0] + 1).all()
    assert (batch["targets"][1] == IGNORED).all()
    # Inputs share their memory with the targets that were read.
    assert (batch["inputs"] == torch.arange(64)).all()


def test_batches_read_together_equal_batches_read_alone(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, order = make_rows(index, document_mask=True), np.arange(28) * 11 % 28
    chunks, samples = np.where(order < 14, 0, 3), order % 14
    addresses = rows.plan(np.ones_like(chunks), chunks, samples).reshape(14, 2, 3)
    together = list(rows.batches(addresses))
    monkeypatch.setattr("datamodules.rows.READ_TOKENS", 1)
    sent = pickle.loads(pickle.dumps(rows))  # as to a worker process
    for ours, alone in zip(together, sent.batches(addresses), strict=True):
        assert all(torch.equal(ours[name], alone[name]) for name in ours)


@pytest.mark.parametrize("epoch", [None, 3])
def test_documents_count_from_each_end_token_on(index: Index, epoch: int | None) -> None:
    ends = {3, 10, 63, 64, 127}
    batch = read(make_rows(index, document_mask=True), epoch, [(0, 0), (0, 1), (3, 0), (4, 0)])
    assert batch["documents"].dtype == torch.int32
    for row, chunk in enumerate([0, 0, 3, 4]):
        number, expected = 0, []
        for column, token in enumerate(batch["inputs"][row].tolist()):
            number += column > 0 and token - FIRSTS[chunk] in ends
            expected.append(number)
        assert batch["documents"][row].tolist() == expected
    assert batch["documents"].max() >= 2


def test_chunks_without_a_token_have_no_rows(
    make_dataset: Callable[..., Index], tmp_path: Path
) -> None:
    rows = make_rows(make_dataset(tmp_path / "train", [[100, 0], [0, 130]]))
    assert rows.samples_per_block.tolist() == [1, 0, 0, 2]
    assert read(rows, None, [(0, 0), (3, 1)])["inputs"][:, 0].tolist() == [0, 164]


def test_data_without_a_row_is_refused_with_both_lengths(index: Index) -> None:
    message = r"datamodule.sequence_length=1000 -> .* whose longest chunk has 1000 ->"
    with pytest.raises(ValueError, match=message):
        make_rows(index, sequence_length=1000)
