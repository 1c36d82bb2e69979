"""Packed rows against a plain packer, and against the documents that went in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules import pack as pack_module
from datamodules.batch import IGNORED
from datamodules.corpora import Corpus
from datamodules.index import Index, read_index, write_index
from datamodules.loader import TrainLoader, order_of
from datamodules.pack import PackedRows, pack
from datamodules.rows import TextRows
from datamodules.tokenization import load_tokenizer
from datamodules.write import ShardWriter

T, END = 50, 65_000
SCHEMA = {
    "tokens.npy": {"codec": "npy", "dtype": "uint16"},
    "ends.npy": {"codec": "npy", "dtype": "uint32"},
}


def plain_pack(lengths: list[int], capacity: int) -> list[list[tuple[int, int]]]:
    """Best-fit decreasing as textbooks have it, in quadratic time: (start, length) by row."""
    segments, start = [], 0
    for length in lengths:
        for done in range(0, length, capacity):
            segments.append((start + done, min(capacity, length - done)))
        start += length
    rows: list[list[int]] = []
    touched: list[int] = []
    for time, segment in enumerate(sorted(range(len(segments)), key=lambda s: -segments[s][1])):
        room = [capacity - sum(segments[other][1] for other in row) for row in rows]
        fitting = [row for row in range(len(rows)) if room[row] >= segments[segment][1]]
        if fitting:  # of equally full rows the one that was filled last
            row = min(fitting, key=lambda row: (room[row], -touched[row]))
            rows[row].append(segment)
            touched[row] = time
        else:
            rows.append([segment])
            touched.append(time)
    return [[segments[segment] for segment in sorted(row)] for row in rows]


def next_fit(lengths: list[int], capacity: int) -> int:
    """Rows that packing in the given order takes."""
    rows, room = 0, 0
    for length in lengths:
        for done in range(0, length, capacity):
            part = min(capacity, length - done)
            if part > room:
                rows, room = rows + 1, capacity
            room -= part
    return rows


@pytest.mark.parametrize("seed", range(6))
def test_packing_equals_a_plain_packer(seed: int) -> None:
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 60))
    lengths = rng.integers(1, [3 * capacity, 20][seed % 2] + 2, 300).tolist()
    packing = pack(np.array(lengths), capacity)
    ours = [
        list(zip(packing.start[a:b].tolist(), packing.length[a:b].tolist(), strict=True))
        for a, b in zip(packing.first[:-1], packing.first[1:], strict=True)
    ]
    assert ours == plain_pack(lengths, capacity)


def test_rows_are_full_where_next_fit_leaves_a_fifth_empty() -> None:
    rng = np.random.default_rng(0)
    lengths = np.maximum(rng.lognormal(6, 1, 8192), 5).astype(np.int64)  # median 400 tokens
    capacity = 2048
    rows = len(pack(lengths, capacity).first) - 1
    assert lengths.sum() / (rows * capacity) > 0.99
    assert lengths.sum() / (next_fit(lengths.tolist(), capacity) * capacity) < 0.85


DOCUMENTS = [
    # Longer than a row, of a whole row, of one token; chunks end anywhere in them.
    [120, 1, 50, 51, 49, *range(3, 40)],
    [5],
    [7, 33, 400, 2, 2, 2, 90, *range(10, 60, 3)],
]


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    """Documents whose tokens count through the data set, in chunks of 64 and windows of 16."""
    monkeypatch.setattr(pack_module, "WINDOW_DOCUMENTS", 16)
    facts, first = [], 0
    for number, lengths in enumerate(DOCUMENTS):
        with ShardWriter(tmp_path / f"train-{number:06d}.tar") as writer:
            tokens = np.arange(first, first := first + sum(lengths), dtype="<u2")
            for chunk in np.split(tokens, range(64, len(tokens), 64)):
                writer.write(len(chunk), {"tokens.npy": chunk, "ends.npy": np.zeros(0, "<u4")})
            facts.append(writer.finish(lengths))
    write_index(tmp_path, schema=SCHEMA, tokenizer=None, shards=facts)
    return read_index(tmp_path)


def make_rows(index: Index) -> PackedRows:
    return PackedRows(index, sequence_length=T, end_token=END)


def make_loader(rows: PackedRows, rank: int = 0, world: int = 1) -> TrainLoader:
    num_rows = int(rows.samples_per_block.sum())
    return TrainLoader(
        rows,
        order_of(rows, seed=0, batch_samples=8, window_mb=0.01, tail="pad_mask"),
        batch_samples=8,
        micro_batch=2,
        max_samples=2 * -(-num_rows // 8) * 8,  # two epochs
        num_workers=0,
        repeat_first_batch=False,
        rank=rank,
        world_size=world,
    )


def join(batches: list[Any]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def test_every_token_is_a_target_once_an_epoch(index: Index) -> None:
    rows = make_rows(index)
    assert len(rows.samples_per_block) > 4
    batches = list(make_loader(rows))
    epochs = [join(batches[: len(batches) // 2]), join(batches[len(batches) // 2 :])]
    for epoch in epochs:
        targets = epoch["targets"]
        assert targets.shape[1] == T
        assert sorted(targets[targets != IGNORED].tolist()) == list(range(index.lengths.sum()))
    assert not torch.equal(epochs[0]["targets"], epochs[1]["targets"])


def test_documents_stay_apart_and_begin_with_an_end_token(index: Index) -> None:
    lengths = np.concatenate(DOCUMENTS)
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.cumsum(lengths) - lengths
    shard_starts = np.cumsum([0, *map(sum, DOCUMENTS[:-1])]).tolist()
    epoch = join(list(make_loader(make_rows(index))))
    pieces_seen = set()
    for inputs, targets, documents in zip(*(epoch[k].tolist() for k in epoch), strict=True):
        assert documents[0] == 0
        assert set(np.diff(documents)) <= {0, 1}
        for number in range(documents[-1] + 1):
            places = [place for place in range(T) if documents[place] == number]
            own = [targets[place] for place in places]
            before = [inputs[place] for place in places]
            if own[0] == IGNORED:  # what no document fills, or a row that fills the step up
                assert set(own) == {IGNORED}
                continue
            assert own == list(range(own[0], own[0] + len(own)))
            assert before[1:] == own[:-1]
            assert before[0] == (END if own[0] in shard_starts else own[0] - 1)
            (document,) = set(document_of[own].tolist())
            assert (own[0] - starts[document]) % T == 0
            assert len(own) == min(T, starts[document] + lengths[document] - own[0])
            pieces_seen.add((document, own[0]))
    assert len(pieces_seen) == sum(-(-length // T) for length in lengths)


def test_packed_rows_resume_in_another_world(index: Index) -> None:
    reference = join(list(make_loader(make_rows(index))))["targets"]
    ranks = [make_loader(make_rows(index), rank, 4) for rank in range(4)]
    for loader in ranks:
        loader.restore({**loader.stream_state(), "position": 3 * 8})
    parts = [join(list(loader))["targets"] for loader in ranks]
    assert torch.equal(torch.stack(parts, 1).reshape(-1, T), reference[3 * 8 :])


def test_state_of_rows_that_were_cut_otherwise_is_refused(index: Index) -> None:
    packed = make_loader(make_rows(index))
    cut = make_loader(TextRows(index, sequence_length=T, document_mask=False, seed=0))
    for ours, theirs in ((packed, cut), (cut, packed)):
        # Even where both happen to have as many rows.
        same = {name: ours.stream_state()[name] for name in ("samples_per_epoch", "window")}
        with pytest.raises(ValueError, match=r"packing=.* -> the checkpoint's .* has packing="):
            ours.restore({**theirs.stream_state(), **same})


def test_packed_text_is_the_text_that_went_in(
    make_corpus: Callable[..., Corpus], jsonl: Path, documents: list[str], tmp_path: Path
) -> None:
    prepared = make_corpus(jsonl, tokenizer="bpe", vocab_size=300).prepare(tmp_path / "data")
    tokenizer, end = load_tokenizer(prepared.path / "tokenizer.json"), prepared.facts["end_token"]
    found = []
    for split in ("train", "val", "test"):
        index = read_index(prepared.path / split)
        rows = PackedRows(index, sequence_length=int(index.documents.max()), end_token=end)
        batch = join(list(make_loader(rows))[: len(make_loader(rows)) // 2])
        for targets, numbers in zip(batch["targets"], batch["documents"], strict=True):
            for number in range(int(numbers[-1]) + 1):
                tokens = targets[numbers == number].tolist()
                if tokens[0] != IGNORED:
                    assert tokens.index(end) == len(tokens) - 1
                    found.append(tokenizer.decode(tokens[:-1], skip_special_tokens=False))
    assert sorted(found) == sorted(documents)


def test_data_without_documents_is_refused(
    make_dataset: Callable[..., Index], tmp_path: Path
) -> None:
    index = make_dataset(tmp_path / "train", [[100]])
    with pytest.raises(ValueError, match=r"packing=best_fit -> .* has no lengths of documents"):
        make_rows(index)
