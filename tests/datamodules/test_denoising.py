"""Corrupted text in batches: over ranks, workers and lives, against the rows it was made of."""

import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.batch import IGNORED, PairBatch
from datamodules.corpora import Corpus
from datamodules.corruption import PrefixLM, count_noise, lengths_for
from datamodules.denoising import CorruptedRows, DenoisingDataModule
from datamodules.facts import PreparedData
from datamodules.index import Index
from datamodules.loader import EvaluationLoader, TrainLoader, order_of
from datamodules.rows import TextRows
from tests.datamodules.spans import END, SENTINELS, make_corruption, reassemble
from tests.datamodules.stream_settings import STREAM

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    # Python 3.12 and later say so of every fork after torch's threads have started.
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

START, L, G = 65_000, 40, 12


OBJECTIVES = {"spans": make_corruption(L), "prefix": PrefixLM(L, end_token=END)}


@pytest.fixture
def index(make_dataset: Callable[..., Index], tmp_path: Path) -> Index:
    return make_dataset(tmp_path / "train", [[700, 900, 50], [2000], [10, 1500, 330]])


def make_rows(index: Index, name: str, seed: int = 1) -> CorruptedRows:
    rows = TextRows(index, sequence_length=L, document_mask=False, seed=seed)
    return CorruptedRows(rows, OBJECTIVES[name], start_token=START, seed=seed)


def make_loader(rows: CorruptedRows, rank: int = 0, world: int = 1, **own: Any) -> TrainLoader:
    steps = 2 * -(-int(rows.samples_per_block.sum()) // G)
    settings = {"micro_batch": G // world, "num_workers": 0, **own}
    return TrainLoader(
        rows,
        order_of(rows, seed=1, batch_samples=G, window_mb=0.004, tail="pad_mask"),
        batch_samples=G,
        max_samples=steps * G,
        repeat_first_batch=False,
        rank=rank,
        world_size=world,
        **settings,
    )


def pairs_in(batch: PairBatch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    found = []
    for n in range(len(batch["source"])):
        source = batch["source"][n][batch["source_mask"][n]].tolist()
        target = batch["targets"][n][batch["targets"][n] != IGNORED].tolist()
        inputs = batch["inputs"][n].tolist()
        if target:
            assert inputs[: len(target)] == [START, *target[:-1]]
        found.append((tuple(source), tuple(target)))
    return found


def global_order(loaders: list[TrainLoader]) -> list[Any]:
    """Pairs of all steps in global order."""
    ranks = [[pair for batch in loader for pair in pairs_in(batch)] for loader in loaders]
    return [pair for pairs in zip(*ranks, strict=True) for pair in pairs]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_corruption_does_not_depend_on_ranks_workers_micro_batches_or_resume(
    name: str, index: Index
) -> None:
    reference = global_order([make_loader(make_rows(index, name))])
    ranks = []
    for rank in range(3):
        rows = pickle.loads(pickle.dumps(make_rows(index, name)))
        ranks.append(make_loader(rows, rank, 3, micro_batch=2, num_workers=2 * (rank == 1)))
    state = {**ranks[0].stream_state(), "position": 7 * G}
    assert global_order(ranks) == reference
    for loader in ranks:
        loader.restore(state)
    assert global_order(ranks) == reference[7 * G :]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_corruption_follows_seed_epoch_and_row(name: str, index: Index) -> None:
    def corrupt(rows: CorruptedRows, epoch: int | None) -> list[Any]:
        blocks, samples = np.full(12, 3), np.arange(12)  # 2000 tokens: 49 rows, of any phase
        epochs = None if epoch is None else np.full(12, epoch)
        (batch,) = rows.batches(rows.plan(epochs, blocks, samples)[None])
        # Tokens count through the data set; taken from the first on, they show the shape alone.
        shapes = []
        for source, target in pairs_in(batch):
            first = source[0]
            shapes.append(tuple(t - first if t < START else t for t in (*source, *target)))
        return shapes

    rows = make_rows(index, name)
    assert corrupt(rows, 0) == corrupt(make_rows(index, name), 0)
    assert len(set(corrupt(rows, 0))) > 6  # rows differ
    assert corrupt(rows, 0) != corrupt(rows, 1)
    assert corrupt(rows, 0) != corrupt(make_rows(index, name, seed=2), 0)
    assert corrupt(rows, None) == corrupt(make_rows(index, name, seed=2), None)
    assert corrupt(rows, None) != corrupt(rows, 0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_divisor_is_the_steps_targets_over_its_micro_batches(name: str, index: Index) -> None:
    ranks = [list(make_loader(make_rows(index, name), rank, 2, micro_batch=3)) for rank in (0, 1)]
    counts = np.array([[int((b["targets"] != IGNORED).sum()) for b in own] for own in ranks])
    expected = counts.reshape(2, -1, 2).sum((0, 2)) / 4
    for own in ranks:
        divisors = np.array([batch["divisor"].item() for batch in own]).reshape(-1, 2)
        assert np.allclose(divisors, expected[:, None], rtol=1e-6)
    assert len(set(expected.tolist())) > 1  # the last step of an epoch is filled up


class WithSentinels:
    """A text corpus as it is with `num_sentinels`."""

    def __init__(self, corpus: Corpus, **facts: Any) -> None:
        self.corpus, self.facts = corpus, facts

    def prepare(self, data_dir: str | Path) -> PreparedData:
        prepared = self.corpus.prepare(data_dir)
        return PreparedData(prepared.path, prepared.facts | self.facts)


def make_data(corpus: Any, tmp_path: Path, **own: Any) -> DenoisingDataModule:
    settings: dict[str, Any] = {
        "corpus": corpus,
        "data_dir": str(tmp_path / "data"),
        "objective": "span_corruption",
        "source_length": 64,
        "noise_density": 0.15,
        "mean_span_length": 3,
        "batch_samples": G,
        "micro_batch": 4,
        "max_samples": 10 * G,
        **STREAM,
    }
    return DenoisingDataModule(**{**settings, **own})


def test_corpus_is_corrupted_from_its_files_on(
    make_corpus: Callable[..., Corpus], jsonl: Path, tmp_path: Path
) -> None:
    corpus = WithSentinels(make_corpus(jsonl, shard_mb=1, chunk_kb=16), sentinels=SENTINELS)
    data = make_data(corpus, tmp_path)
    batch = next(iter(data.train_dataloader()))
    row_length, target_length = lengths_for(64, 0.15, 3)
    assert batch["source"].shape == (4, 64)
    assert batch["source_mask"].all()
    assert batch["targets"].shape == (4, target_length)
    assert (batch["inputs"][:, 0] == data.facts["end_token"]).all()
    assert batch["divisor"].item() == 4 * target_length
    _, num_spans = count_noise(row_length, 0.15, 3)
    assert ((batch["source"] >= min(SENTINELS)).sum(1) == num_spans).all()
    prefix = make_data(WithSentinels(corpus.corpus, start_token=9), tmp_path, objective="prefix_lm")
    batch = next(iter(prefix.train_dataloader()))
    assert (batch["inputs"][:, 0] == 9).all()
    assert max(batch["source"].shape[1], batch["targets"].shape[1]) <= 64


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 50), (3, 8)])
def test_evaluation_has_each_row_once(world: int, micro_batch: int, index: Index) -> None:
    seen: list[int] = []
    for rank in range(world):
        loader = EvaluationLoader(
            make_rows(index, "spans"),
            micro_batch=micro_batch,
            max_samples=None,
            rank=rank,
            world_size=world,
        )
        for batch in loader:
            for source, target in pairs_in(batch):
                if target:
                    seen += reassemble(list(source), list(target))
    lengths = [700, 900, 50, 2000, 10, 1500, 330]
    firsts = np.cumsum(lengths) - lengths
    rows = [range(f, f + (n - 1) // L * L) for f, n in zip(firsts, lengths, strict=True)]
    assert sorted(seen) == [*itertools.chain(*rows)]


def test_corpora_that_cannot_be_corrupted_are_refused(
    make_corpus: Callable[..., Corpus], jsonl: Path, text_file: Path, tmp_path: Path
) -> None:
    corpus = make_corpus(jsonl, shard_mb=1, chunk_kb=16)
    with pytest.raises(ValueError, match=r"corpus.num_sentinels=0 -> .* takes out 3 spans"):
        make_data(corpus, tmp_path).train_dataloader()
    one = make_corpus(text_file, end_token=None)
    with pytest.raises(ValueError, match=r"objective=prefix_lm -> the corpus is one document"):
        make_data(one, tmp_path, objective="prefix_lm").train_dataloader()
    with pytest.raises(ValueError, match=r"source_length=99999 -> rows have 99999 tokens, and the"):
        make_data(corpus, tmp_path, objective="prefix_lm", source_length=99_999).train_dataloader()
    with pytest.raises(ValueError, match=r"datamodule.objective=bert -> unknown -> choose one of"):
        make_data(corpus, tmp_path, objective="bert")
