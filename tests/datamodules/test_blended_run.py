"""A run over two corpora, from JSONL files to batches."""

import io
import json
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.batch import IGNORED
from datamodules.blend import Blend
from datamodules.corpora import Corpus
from datamodules.index import read_index
from datamodules.text import TextDataModule
from tests.datamodules.by_hand import read_with_webdataset
from tests.datamodules.stream_settings import STREAM


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path]:
    """Two corpora of other letters and lengths."""
    rng = random.Random(0)
    paths = {}
    for name, letters, count in (("small", "abcd", 60), ("large", "WXYZ", 200)):
        texts = ["".join(rng.choices(letters, k=rng.randint(50, 400))) for _ in range(count)]
        paths[name] = tmp_path / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return paths


@pytest.fixture
def make_blend(make_corpus: Callable[..., Corpus], paths: dict[str, Path]) -> Callable[..., Blend]:
    def make(**own: Any) -> Blend:
        sources = {n: {"path": str(p), "weight": 1, **own.get(n, {})} for n, p in paths.items()}
        settings = asdict(make_corpus("unused", val_fraction=0.2, chunk_kb=1))
        return Blend(sources=sources, **{**settings, "name": "mix"} | own.get("every", {}))

    return make


def make_data(corpus: Blend, tmp_path: Path, rank: int = 0, world: int = 1, **settings: Any) -> Any:
    class OfRank(TextDataModule):
        def __init__(self) -> None:
            defaults: dict[str, Any] = {
                "corpus": corpus,
                "data_dir": str(tmp_path / "data"),
                "sequence_length": 64,
                "packing": "cut",
                "document_mask": True,
                "batch_samples": 24,
                "micro_batch": 4,
                "max_samples": 60 * 24,
                **STREAM,
            }
            super().__init__(**{**defaults, **settings})

        @property
        def rank(self) -> int:
            return rank

        @property
        def world_size(self) -> int:
            return world

    return OfRank()


def steps_of(modules: list[Any], skip: int = 0) -> list[torch.Tensor]:
    """Inputs of each optimizer step, in global order."""
    ranks = [
        torch.cat([batch["inputs"] for batch in module.train_dataloader()]) for module in modules
    ]
    return list(torch.stack(ranks, 1).reshape(-1, 24, 64))[skip:]


@pytest.mark.parametrize("packing", ["cut", "best_fit"])
def test_run_over_two_corpora_resumes_in_another_world(
    packing: str, make_blend: Callable[..., Blend], tmp_path: Path
) -> None:
    corpus = make_blend(small={"weight": 0.75}, large={"weight": 0.25})
    whole = make_data(corpus, tmp_path, packing=packing)
    reference = steps_of([whole])
    passes = whole.epochs
    assert passes.keys() == {"small", "large"}
    assert passes["small"] > 3 * passes["large"] > 0
    assert whole.epoch == int(passes["large"])

    is_small = (torch.stack(reference) > ord("Z")).float().mean()
    assert 0.65 < is_small < 0.8  # of tokens; end tokens and padding count for neither
    state = {**whole.state_dict(), "position": 25 * 24}
    resumed = [make_data(corpus, tmp_path, rank, 3, packing=packing) for rank in range(3)]
    for module in resumed:
        module.load_state_dict(json.loads(json.dumps(state)))
    assert all(map(torch.equal, steps_of(resumed), reference[25:]))
    shifted = make_data(corpus, tmp_path, packing=packing)
    shifted.load_state_dict({**state, "position": 24 * 24})
    assert not torch.equal(steps_of([shifted])[0], reference[25])
    other = make_data(make_blend(small={"weight": 0.7}), tmp_path, packing=packing)
    other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"weights=.*0.41.* -> the checkpoint's .*weights=.*0.75"):
        other.train_dataloader()


@pytest.mark.parametrize("world", [1, 3])
def test_validation_takes_each_row_of_both_corpora_once(
    world: int, make_blend: Callable[..., Blend], tmp_path: Path
) -> None:
    corpus, seen = make_blend(), []
    for rank in range(world):
        for batch in make_data(corpus, tmp_path, rank, world).val_dataloader():
            counts = (batch["targets"] != IGNORED).all(dim=1)
            seen += [tuple(row) for row in batch["targets"][counts].tolist()]
    expected = []
    for part in corpus.prepare(tmp_path / "data").facts["sources"].values():
        index = read_index(Path(part["path"], "val"))
        assert len(index.lengths) > 1
        for shard in index.shards:
            for sample in read_with_webdataset(Path(shard.url)):
                tokens = np.load(io.BytesIO(sample["tokens.npy"])).tolist()
                rows = range(0, len(tokens) - 64, 64)
                expected += [tuple(tokens[at + 1 : at + 65]) for at in rows]
    assert sorted(seen) == sorted(expected)


def test_bad_sample_of_a_source_is_named_with_its_own_folder(
    make_blend: Callable[..., Blend], tmp_path: Path
) -> None:
    corpus = make_blend()
    folder = Path(corpus.prepare(tmp_path / "data").facts["sources"]["large"]["path"], "val")
    for shard in folder.glob("*.tar"):
        shard.write_bytes(shard.read_bytes()[:1024] + bytes(shard.stat().st_size - 1024))
    with pytest.raises(ValueError, match=rf"data set {folder}: .*\(shard val-"):
        list(make_data(corpus, tmp_path).val_dataloader())


def test_padded_epochs_of_a_blend_are_refused(
    make_blend: Callable[..., Blend], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"datamodule.tail=pad_mask -> .* -> use drop or carry"):
        make_data(make_blend(), tmp_path, tail="pad_mask").train_dataloader()
    assert len(steps_of([make_data(make_blend(), tmp_path, tail="carry")])) == 60


def test_end_token_that_the_first_source_lacks_is_in_the_vocabulary(
    make_blend: Callable[..., Blend], tmp_path: Path
) -> None:
    one = tmp_path / "one.txt"
    one.write_text("abcdWXYZ" * 500)
    corpus = make_blend(small={"path": str(one)}, every={"tokenizer": "char"})
    data = make_data(corpus, tmp_path)
    assert data.facts["end_token"] == 8
    assert data.facts["vocab_size"] == 9 == data.tokenizer.get_vocab_size()
    tokens = torch.stack(steps_of([data]))
    assert tokens.max() == 8


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"large": {"weight": 0}}, r"corpus.sources.large.weight=0 -> no number above 0"),
        ({"large": {"weight": "much"}}, r"corpus.sources.large.weight=much -> no number"),
        ({"large": {"tokenizer": "char"}}, r"large.tokenizer=char -> .* of the first, small ->"),
    ],
)
def test_impossible_source_is_refused(
    own: dict[str, Any], message: str, make_blend: Callable[..., Blend]
) -> None:
    with pytest.raises(ValueError, match=message):
        make_blend(**own)
