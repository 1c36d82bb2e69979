"""The stream from an S3 server that fails now and then, and from compressed shards."""

import gzip
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules import remote, write
from datamodules.corpora import Corpus
from datamodules.index import ShardFacts, read_index, write_index
from datamodules.loader import TrainLoader
from datamodules.prepared import PreparedCorpus
from datamodules.text import TextDataModule
from tests.datamodules.object_store import BUCKET, ObjectStore

FAULTS = ["unavailable", "reset", "truncated", "corrupt"]
STREAM: dict[str, Any] = {
    "sequence_length": 64,
    "packing": "cut",
    "document_mask": True,
    "on_bad_sample": "raise",
    "max_bad_samples": 10,
    "batch_samples": 16,
    "micro_batch": 8,
    "max_samples": 30 * 16,
    "num_workers": 0,
    "repeat_first_batch": False,
    "window_mb": 1,
    "tail": "carry",
    "seed": 3,
    "val_max_samples": None,
}


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    store = ObjectStore()
    yield store
    store.close()


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(write, "BLOCK_BYTES", 8192)


@pytest.fixture
def corpus(make_corpus: Callable[..., Corpus], jsonl: Path) -> Corpus:
    return make_corpus(jsonl, chunk_kb=2)


@pytest.fixture
def make_data(tmp_path: Path, store: ObjectStore) -> Callable[..., TextDataModule]:
    def make(corpus: Any, **settings: Any) -> TextDataModule:
        cache = {
            **{"folder": str(tmp_path / "blocks"), "gb": 0.25, "num_connections": 4},
            **{"max_attempts": 3, "timeout_s": 60, "storage_options": store.options},
        }
        keys = {**STREAM, "cache": cache, **settings}
        return TextDataModule(corpus=corpus, data_dir=str(tmp_path / "data"), **keys)

    return make


@pytest.fixture
def uploaded(corpus: Corpus, store: ObjectStore, tmp_path: Path) -> tuple[PreparedCorpus, str]:
    """The corpus in the object store, and its name there."""
    path = corpus.prepare(tmp_path / "data").path
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        store.put(f"{path.name}/{file.relative_to(path).as_posix()}", file.read_bytes())
    root = f"s3://{BUCKET}/{path.name}"
    options = {**store.options, "skip_instance_cache": True}
    return PreparedCorpus(name="copy", path=root, storage_options=options), path.name


def drain(loader: TrainLoader) -> list[torch.Tensor]:
    return [torch.cat([batch["inputs"], batch["documents"]]) for batch in loader]


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("packing", ["cut", "best_fit"])
def test_remote_shards_give_the_batches_of_local_ones(
    packing: str,
    corpus: Corpus,
    uploaded: tuple[PreparedCorpus, str],
    make_data: Callable[..., TextDataModule],
    store: ObjectStore,
) -> None:
    there, name = uploaded
    local = make_data(corpus, packing=packing)
    expected = drain(local.train_dataloader())
    shards = [Path(s.url).name for s in read_index(Path(local.facts["path"], "train")).shards]
    for number, shard in enumerate(shards):
        store.faults[f"{name}/train/{shard}"] += [FAULTS[number % len(FAULTS)]]
    data = make_data(there, packing=packing)
    assert data.facts["digest"] == local.facts["digest"]
    loader = data.train_dataloader()
    assert equal(drain(loader), expected)
    counts = loader.counters()
    assert not any(store.faults.values())
    assert counts["retries"] > len(shards) // 2  # a reset may be repeated by the client itself
    assert counts["cache_misses"] + counts["cache_hits"] > 0
    assert counts["bytes"] == local.counters()["bytes"]
    assert [b["inputs"].tolist() for b in data.val_dataloader()] == [
        b["inputs"].tolist() for b in local.val_dataloader()
    ]
    # What is on the disk now is not fetched again.
    again = make_data(there, packing=packing).train_dataloader()
    assert equal(drain(again), expected)
    assert again.counters()["fetched_bytes"] == 0


def test_nodes_that_share_the_folder_have_caches_of_their_own(
    uploaded: tuple[PreparedCorpus, str],
    make_data: Callable[..., TextDataModule],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fetched = []
    for node in ("one", "two", "one"):
        monkeypatch.setattr("platform.node", lambda node=node: node)
        loader = make_data(uploaded[0]).train_dataloader()
        drain(loader)
        fetched.append(loader.counters()["fetched_bytes"])
    assert fetched[0] == fetched[1] > 0
    assert fetched[2] == 0
    assert {path.name for path in (tmp_path / "blocks").iterdir()} == {"one", "two"}


def test_run_moves_between_disk_and_object_store(
    corpus: Corpus, uploaded: tuple[PreparedCorpus, str], make_data: Callable[..., TextDataModule]
) -> None:
    local, there = make_data(corpus), make_data(uploaded[0], num_workers=2)
    expected = drain(local.train_dataloader())
    begun = make_data(corpus)
    list(islice(iter(begun.train_dataloader()), 2 * 7))
    there.load_state_dict(begun.state_dict())
    assert equal(drain(there.train_dataloader()), expected[2 * 7 :])


def test_block_that_stays_wrong_is_an_error_or_substituted(
    corpus: Corpus,
    uploaded: tuple[PreparedCorpus, str],
    make_data: Callable[..., TextDataModule],
    store: ObjectStore,
    tmp_path: Path,
) -> None:
    there, name = uploaded
    path = corpus.prepare(tmp_path / "data").path
    shard = sorted((path / "train").glob("*.tar"))[0]
    content = bytearray(shard.read_bytes())
    content[1700] ^= 1  # within the tokens of the first sample
    store.put(f"{name}/train/{shard.name}", bytes(content))
    message = rf"{shard.name}: the block at byte 0 .* \(its checksums differ\), .* of 3 attempts"
    with pytest.raises(ValueError, match=message):
        drain(make_data(there).train_dataloader())
    data = make_data(there, on_bad_sample="substitute")
    drain(data.train_dataloader())
    assert data.counters()["bad_samples"] == 1


def test_cache_smaller_than_what_is_mixed_is_refused(
    uploaded: tuple[PreparedCorpus, str], make_data: Callable[..., TextDataModule]
) -> None:
    cache = {"folder": "nowhere", "gb": 0.001}
    with pytest.raises(
        ValueError, match=r"datamodule.cache.gb=0.001 -> the shuffle mixes 16 lanes"
    ):
        make_data(uploaded[0], cache=cache).train_dataloader()


def test_corpus_is_prepared_as_the_experiment_expects(
    uploaded: tuple[PreparedCorpus, str], store: ObjectStore, tmp_path: Path
) -> None:
    there = {"name": "x", "path": uploaded[0].path, "storage_options": store.options}
    PreparedCorpus(**there, chunk_kb=2).prepare(tmp_path / "copies")
    with pytest.raises(ValueError, match=r"corpus.chunk_kb=4 -> of the data .* it is 2 -> "):
        PreparedCorpus(**there, chunk_kb=4).prepare(tmp_path / "copies")
    with pytest.raises(ValueError, match=r"corpus.chunk=2 -> .* there is no such setting -> .*~"):
        PreparedCorpus(**there, chunk=2).prepare(tmp_path / "copies")


def test_missing_corpus_is_named(store: ObjectStore, tmp_path: Path) -> None:
    corpus = PreparedCorpus(name="x", path="s3://shards/none", storage_options=store.options)
    with pytest.raises(
        ValueError, match=r"corpus.path=s3://shards/none -> there is no dataset.json"
    ):
        corpus.prepare(tmp_path)
    with pytest.raises(ValueError, match=r"there is no dataset.json in it"):
        PreparedCorpus(name="x", path=str(tmp_path), storage_options={}).prepare(tmp_path)


@pytest.mark.parametrize("form", ["{path}.gz", "pipe:cat {path}"])
def test_sequential_shards_give_the_batches_of_plain_ones(
    form: str, corpus: Corpus, make_data: Callable[..., TextDataModule], tmp_path: Path
) -> None:
    path = corpus.prepare(tmp_path / "data").path
    expected = drain(make_data(corpus).train_dataloader())
    copy = tmp_path / "sequential"
    shutil.copytree(path, copy)
    _name_shards_anew(copy / "train", form)
    there = PreparedCorpus(name="x", path=str(copy), storage_options={})
    # The order of text is one of chunks, whatever the blocks that they lie in.
    assert equal(drain(make_data(there).train_dataloader()), expected)


def _name_shards_anew(folder: Path, form: str) -> None:
    """Write the index of the same samples in shards of one block under other names."""
    index, facts = read_index(folder), []
    first_block = first_sample = first_document = 0
    for shard in index.shards:
        blocks = index.blocks[first_block : first_block + shard.num_blocks]
        samples = slice(first_sample, first_sample + shard.num_samples)
        documents = slice(first_document, first_document + shard.num_documents)
        url, size = form.format(path=shard.url), 0
        if url.endswith(".gz"):
            Path(url).write_bytes(gzip.compress(Path(shard.url).read_bytes()))
            size = Path(url).stat().st_size
        tar_bytes = Path(shard.url).stat().st_size
        facts.append(
            ShardFacts(
                replace(shard, url=url, num_bytes=size, num_blocks=1),
                [(int(blocks[:, 0].sum()), tar_bytes)],
                index.lengths[samples].tolist(),
                index.checksums[samples].tolist(),
                index.documents[documents].tolist(),
            )
        )
        first_block, first_sample = first_block + shard.num_blocks, samples.stop
        first_document = documents.stop
    write_index(folder, schema=index.schema, tokenizer=index.tokenizer, shards=facts)
