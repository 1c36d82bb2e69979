import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from datamodules.batch import TextBatch
from datamodules.corpora import Corpus
from datamodules.text import TextDataModule
from tests.datamodules.stream_settings import STREAM

pytestmark = [
    # Lightning 2.6 uses what torch 2.13 deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    # Python 3.12 and later say so of every fork after torch's threads have started.
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

MAX_STEPS = 30
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@pytest.fixture
def make_data(
    make_corpus: Callable[..., Corpus], documents: list[str], tmp_path: Path
) -> Callable[..., TextDataModule]:
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))

    def make(**settings: Any) -> TextDataModule:
        defaults: dict[str, Any] = {
            "corpus": make_corpus(path, shard_mb=1, chunk_kb=16),
            "data_dir": str(tmp_path / "data"),
            "sequence_length": 256,
            "packing": "cut",
            "document_mask": True,
            "batch_samples": 48,
            "micro_batch": 24,
            "max_samples": MAX_STEPS * 48,
            **STREAM,
        }
        return TextDataModule(**{**defaults, **settings})

    return make


class Recorder(LightningModule):
    """Train one number, and write down every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: list[torch.Tensor] = []
        self.validated = 0

    def training_step(self, batch: TextBatch) -> torch.Tensor:
        self.batches.append(batch["inputs"].clone())
        return self.weight * batch["inputs"].float().mean()

    def validation_step(self, batch: TextBatch) -> None:
        self.validated += int((batch["targets"][:, 0] >= 0).sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


class StopAt(Callback):
    """Save at the end of an optimizer step and leave, as a preempted run does."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def fit(data: TextDataModule, callbacks: list[Callback], resume: Path | None = None) -> Recorder:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=2,
        val_check_interval=20,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    recorder = Recorder()
    trainer.fit(recorder, data, ckpt_path=resume)
    return recorder


@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_fit_sees_the_same_batches(
    workers: int, make_data: Callable[..., TextDataModule], tmp_path: Path
) -> None:
    whole = fit(make_data(), []).batches
    assert len(whole) == MAX_STEPS * 2
    data = make_data(num_workers=workers)
    checkpoint = tmp_path / "stopped.ckpt"
    before = fit(data, [StopAt(13, checkpoint)]).batches
    assert data.state_dict()["position"] == 13 * 48
    resumed = make_data(num_workers=2 - workers)
    after = fit(resumed, [], checkpoint).batches
    assert len(before) == 13 * 2
    assert len(after) == 17 * 2
    assert all(torch.equal(a, b) for a, b in zip([*before, *after], whole, strict=True))
    assert not torch.equal(after[0], whole[0])
    assert resumed.state_dict()["position"] == MAX_STEPS * 48
    assert resumed.epoch > data.epoch > 0
    assert resumed.seconds_waited > 0


def test_state_reaches_a_loader_that_exists_already(
    make_data: Callable[..., TextDataModule],
) -> None:
    first, second = make_data(), make_data()
    reference = list(first.train_dataloader())
    second.prepare_data()
    loader = second.train_dataloader()
    batches = iter(loader)  # lazy, so a state may still come
    second.load_state_dict({**second.state_dict(), "position": 5 * 48})
    for ours, theirs in zip(batches, reference[10:], strict=True):
        assert torch.equal(ours["inputs"], theirs["inputs"])


def test_state_before_any_loader_is_kept(make_data: Callable[..., TextDataModule]) -> None:
    data = make_data()
    assert data.state_dict() == {}
    state = {**make_data().train_dataloader().stream_state(), "position": 96}
    data.load_state_dict(state)
    assert data.state_dict() == state
    assert data.train_dataloader().position == 96


def test_validation_sees_each_row_once(make_data: Callable[..., TextDataModule]) -> None:
    recorder = fit(make_data(max_samples=10 * 48), [])
    loader = make_data().val_dataloader()
    assert recorder.validated == loader.num_samples > 0
    assert make_data(val_max_samples=5).val_dataloader().num_samples == 5
    assert make_data(val_max_samples=5).test_dataloader().num_samples > 5


def test_batches_hold_text_of_the_tokenizer(
    make_data: Callable[..., TextDataModule], documents: list[str]
) -> None:
    data = make_data()
    text, end = "".join(documents), "<|endoftext|>"
    batch = next(iter(data.val_dataloader()))
    assert batch["documents"].shape == batch["inputs"].shape == (24, 256)
    boundaries = batch["inputs"][:, 1:] == data.facts["end_token"]
    assert torch.equal(batch["documents"].diff(dim=1) == 1, boundaries)
    assert batch["documents"].max() > 0
    for row in batch["inputs"]:
        for part in data.tokenizer.decode(row.tolist(), skip_special_tokens=False).split(end):
            # The row may cut a character of several bytes at either end.
            assert part.strip("\ufffd") in text


def test_missing_split_is_refused(
    make_data: Callable[..., TextDataModule], make_corpus: Callable[..., Corpus], tmp_path: Path
) -> None:
    corpus = make_corpus(tmp_path / "documents.jsonl", test_fraction=0.0)
    with pytest.raises(ValueError, match=r"corpus.test_fraction=0 -> .* has no test split"):
        make_data(corpus=corpus).test_dataloader()
