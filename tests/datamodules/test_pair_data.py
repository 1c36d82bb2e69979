"""The datamodule of pairs, from a prepared folder on."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import DictConfig

from datamodules.batch import IGNORED
from datamodules.corpora import Corpus
from datamodules.denoising import DenoisingDataModule
from datamodules.pairs import PairDataModule
from tests.datamodules.pair_shards import PreparedPairs, draw_pairs, text_of
from tests.datamodules.stream_settings import STREAM

SPLITS = {
    "train": draw_pairs(200, longest=30),
    "val": draw_pairs(23, longest=30, seed=1),
    "test": draw_pairs(31, longest=30, seed=2),
}


@pytest.fixture
def prepared(tmp_path: Path) -> PreparedPairs:
    return PreparedPairs(tmp_path / "pairs", SPLITS)


def make_data(corpus: Any, rank: int = 0, world: int = 1, **own: Any) -> PairDataModule:
    class OfRank(PairDataModule):
        @property
        def rank(self) -> int:
            return rank

        @property
        def world_size(self) -> int:
            return world

    settings: dict[str, Any] = {
        "corpus": corpus,
        "data_dir": "unused",
        "max_source_tokens": 30,
        "max_target_tokens": 30,
        "longer": "raise",
        "group_tokens": None,
        "eval_pairs": 5,
        "batch_samples": 12,
        "micro_batch": 4,
        "max_samples": 240,
        **STREAM,
    }
    return OfRank(**{**settings, **own})


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_gives_each_pair_once_with_its_texts(
    world: int, split: str, prepared: PreparedPairs
) -> None:
    seen: Counter[Any] = Counter()
    for rank in range(world):
        data = make_data(prepared, rank, world, group_tokens=120)  # groups are for training
        for batch in getattr(data, f"{split}_dataloader")():
            assert len(batch["texts"]) == len(batch["source"]) == 5
            for row, text in enumerate(batch["texts"]):
                source = tuple(batch["source"][row][batch["source_mask"][row]].tolist())
                target = batch["targets"][row]
                if (target != IGNORED).any():
                    seen[source, tuple(target[target != IGNORED].tolist()), text] += 1
    texts = [text_of(number) for number in range(len(SPLITS[split]))]
    assert seen == Counter((*p, t) for p, t in zip(SPLITS[split], texts, strict=True))


def test_long_pairs_are_dropped_in_training_and_cut_in_evaluation(prepared: PreparedPairs) -> None:
    data = make_data(prepared, longer="drop", max_target_tokens=15)
    kept = [pair for pair in SPLITS["train"] if len(pair[1]) <= 15]
    assert data.source("train").samples_per_block.sum() == len(kept) < 200
    lengths = [
        int((row != IGNORED).sum()) for batch in data.val_dataloader() for row in batch["targets"]
    ]
    expected = [min(15, len(target)) for _, target in SPLITS["val"]]
    assert lengths[: len(expected)] == expected
    with pytest.raises(ValueError, match=r"datamodule.max_target_tokens=15 -> .* longer target"):
        make_data(prepared, max_target_tokens=15).val_dataloader()


def test_groups_are_concatenated_to_micro_batches(prepared: PreparedPairs) -> None:
    batches = list(make_data(prepared, group_tokens=120, max_samples=48).train_dataloader())
    assert len(batches) == 12
    assert len({len(batch["source"]) for batch in batches}) > 1
    assert all("texts" not in batch for batch in batches)
    alone = list(
        make_data(prepared, group_tokens=120, max_samples=48, micro_batch=1).train_dataloader()
    )
    assert all(b["source"].numel() + b["targets"].numel() <= 120 for b in alone)
    sizes = [len(batch["source"]) for batch in alone]
    assert [sum(sizes[n : n + 4]) for n in range(0, 48, 4)] == [len(b["source"]) for b in batches]


def test_target_tokenizer_is_the_one_of_the_targets(tmp_path: Path) -> None:
    joint = PreparedPairs(tmp_path / "joint", SPLITS)
    assert make_data(joint).target_tokenizer.get_vocab() == {"a": 0, "b": 1}
    separate = PreparedPairs(tmp_path / "separate", SPLITS, is_joint=False)
    tokenizer = (separate.path / "tokenizer.json").read_text().replace('"b"', '"c"')
    (separate.path / "target_tokenizer.json").write_text(tokenizer)
    assert make_data(separate).target_tokenizer.get_vocab() == {"a": 0, "c": 1}
    assert make_data(separate).tokenizer.get_vocab() == {"a": 0, "b": 1}


def test_texts_that_were_changed_are_refused(prepared: PreparedPairs) -> None:
    path = prepared.path / "val" / "texts.jsonl"
    path.write_text(path.read_text().replace("source 3", "source 4"))
    with pytest.raises(ValueError, match=r"texts.jsonl is missing or not as it was written"):
        make_data(prepared).val_dataloader()
    path.unlink()
    with pytest.raises(ValueError, match=r"texts.jsonl is missing or not as it was written"):
        make_data(prepared).val_dataloader()


def test_what_is_no_corpus_of_pairs_is_refused(
    make_corpus: Callable[..., Corpus], jsonl: Path, tmp_path: Path, prepared: PreparedPairs
) -> None:
    with pytest.raises(ValueError, match=r"datamodule=pairs -> the corpus has text, .* -> "):
        make_data(make_corpus(jsonl), data_dir=str(tmp_path / "data")).train_dataloader()
    with pytest.raises(ValueError, match=r"datamodule.longer=keep -> unknown -> choose one of"):
        make_data(prepared, longer="keep")
    with pytest.raises(ValueError, match=r"datamodule.max_source_tokens=1 -> its end token"):
        make_data(prepared, max_source_tokens=1)


@pytest.mark.parametrize(
    ("name", "kind"), [("pairs", PairDataModule), ("denoising", DenoisingDataModule)]
)
def test_configuration_builds_the_datamodule(
    name: str, kind: type, compose: Callable[..., DictConfig]
) -> None:
    config = compose("train", [f"datamodule={name}"])
    config.plan = {"batch_samples": 8, "micro_batch": 4, "max_samples": 80}
    assert type(instantiate(config.datamodule, _convert_="all")) is kind
