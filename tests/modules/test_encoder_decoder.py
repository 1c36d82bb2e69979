import math
from typing import Any

import lightning
import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from datamodules.batch import IGNORED
from modules.encoder_decoder import EncoderDecoder
from modules.scores import score
from tests.modules.small_encoder_decoders import (
    CONFIGURATION,
    FACTS,
    SMALL,
    build,
    make_batch,
    part_of,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]


def gradients(model, batches, is_weighted=True):
    """Of the mean over micro-batches, as accumulation and ranks make it."""
    model.zero_grad()
    for index, batch in enumerate(batches):
        if not is_weighted:
            batch = {**batch, "divisor": (batch["targets"] != IGNORED).sum()}
        (model.training_step(batch, index)["loss"] / len(batches)).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("preset", SMALL)
def test_unequal_micro_batches_give_the_gradient_of_the_whole_batch(preset):
    model, batch = build(preset, label_smoothing=0.1), make_batch()
    parts = [part_of(batch, rows, 2) for rows in (slice(0, 3), slice(3, 4))]
    whole, split = gradients(model, [batch]), gradients(model, parts)
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-4, atol=1e-6)
    wrong = gradients(model, parts, is_weighted=False)
    assert max(float((wrong[n] - g).abs().max()) for n, g in whole.items()) > 1e-3
    logged = [model.training_step(part, 0)["train/loss"] for part in parts]
    total, count = model.training_step(batch, 0)["train/loss"]
    assert sum(each[1] for each in logged) == count == 19
    assert sum(each[0] for each in logged).item() == pytest.approx(total.item(), rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd", "adamw_rms", "adafactor"])
@pytest.mark.parametrize("preset", ["tiny", "lstm_small"])
def test_training_lowers_the_loss(preset, optimizer):
    rate = {"muon": 0.02, "sgd": 0.1, "adamw": 1e-2, "adamw_rms": 0.1, "adafactor": 0.1}[optimizer]
    model = build(preset, optimizer={"name": optimizer, "lr": rate})
    configured = model.configure_optimizers()["optimizer"]  # pyright: ignore
    batch, losses = make_batch(), []
    for index in range(15):
        loss = model.training_step(batch, index)["loss"]  # pyright: ignore
        loss.backward()
        configured.step()
        configured.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(30), abs=0.5)
    assert losses[-1] < losses[0] - (0.3 if optimizer in ("adamw", "muon") else 0.01)


@pytest.mark.parametrize("preset", SMALL)
def test_every_parameter_has_one_role_and_an_initial_value_by_name(preset):
    model = build(preset)
    roles = model.parameters_by_role()
    given = [id(parameter) for parameters in roles.values() for parameter in parameters]
    assert sorted(given) == sorted(id(parameter) for parameter in model.parameters())
    assert all(parameter.ndim == 2 for parameter in roles["matrix"])
    assert roles["matrix"]
    assert roles["embedding"]
    for name, parameter in model.named_parameters():
        assert torch.equal(model.initial_value(name), parameter)


def test_batches_of_text_are_refused():
    batch = make_batch()
    text: Any = {name: batch[name] for name in ("inputs", "targets")}
    with pytest.raises(ValueError, match="datamodule=pairs, or datamodule=denoising"):
        build().training_step(text, 0)


@pytest.mark.parametrize("preset", ["lstm_small", "gru_attention"])
def test_scheduled_teacher_forcing_changes_what_is_fed(preset):
    batch = make_batch()
    forced, free, mixed = (
        build(preset, teacher_forcing={"start": share, "end": share}) for share in (1.0, 0.0, 0.5)
    )
    losses = [model.training_step(batch, 0)["loss"].item() for model in (forced, free, mixed)]
    assert len(set(losses)) == 3
    assert losses[2] == mixed.training_step(batch, 0)["loss"].item()  # the same coins


@pytest.mark.parametrize("preset", ["tiny", "gru_attention"])
def test_flops_of_a_pair_are_near_six_for_a_parameter_and_token(preset):
    model = build(preset)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    flops: Any = model.flops_per_sample()
    assert 0.3 < flops / (6 * num_parameters * 5.5) < 1.5
    assert build(preset, pair_tokens={"pairs": None}).flops_per_sample() is None


class Words:
    """A tokenizer of numbers."""

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids))

    def decode_batch(self, sequences, skip_special_tokens=True):
        return [self.decode(sequence) for sequence in sequences]


class Data(lightning.LightningDataModule):
    tokenizer = target_tokenizer = Words()

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def val_dataloader(self):
        return DataLoader(self.batches, batch_size=None, collate_fn=lambda batch: batch)

    test_dataloader = val_dataloader


def evaluate(model, batches, split="test"):
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    score_split = trainer.test if split == "test" else trainer.validate
    return score_split(model, datamodule=Data(batches), verbose=False)[0]


def with_texts(batch) -> Any:
    texts = [(f"source {row}", "1 2 3 4 5") for row in range(len(batch["targets"]))]
    return {key: value for key, value in batch.items() if key != "divisor"} | {"texts": texts}


@pytest.mark.parametrize("preset", ["tiny", "gru_attention"])
def test_evaluation_is_exact_over_targets(preset):
    model = build(preset, label_smoothing=0.1)
    batches: list[Any] = [with_texts(make_batch(seed=seed)) for seed in range(2)]
    batches[1]["targets"][2:] = IGNORED  # rows that only pad
    found = evaluate(model, batches)
    nats = correct = count = 0.0
    for batch in batches:
        logits = model.network(batch["source"], batch["source_mask"], batch["inputs"])
        for row, targets in zip(logits.log_softmax(-1), batch["targets"], strict=True):
            for place, target in enumerate(targets.tolist()):
                if target != IGNORED:
                    nats -= row[place, target].item()
                    correct += row[place].argmax().item() == target
                    count += 1
    assert found["test/loss"] == pytest.approx(nats / count, rel=1e-5)
    assert found["test/perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert found["test/token_accuracy"] == pytest.approx(correct / count)
    assert len(model.generated.rows) == 6
    values, _ = score(model.generated.rows, ["bleu", "chrf", "rouge"], "13a")
    assert {f"test/{name}": pytest.approx(value) for name, value in values.items()} == {
        key: value for key, value in found.items() if key.partition("/")[2] in values
    }
    assert "tok:13a" in model.generated.signatures["bleu"]


def test_validation_generates_what_generate_does():
    model = build()
    batch = with_texts(make_batch())
    found = evaluate(model, [batch], "val")
    assert "val/bleu" in found
    pairs = zip(batch["source"], batch["source_mask"], strict=True)
    sources = [row[mask].tolist()[:-1] for row, mask in pairs]
    generated = model.generate(sources, seed=0)
    assert [row[2] for row in model.generated.rows] == Words().decode_batch(
        [own for (own,) in generated]
    )
    assert model.preview(Words())[0] == {
        "source": "source 0",
        "target": "1 2 3 4 5",
        "prediction": model.generated.rows[0][2],
    }


def test_without_texts_only_samples_are_generated():
    model = build(scores={"num_rows": 3})
    batches = [make_batch(seed=seed) for seed in range(3)]
    found = evaluate(model, batches, "val")
    assert "val/bleu" not in found
    assert len(model.generated.rows) == 3  # of the first batch alone
    assert model.generated.rows[0][0] == Words().decode(batches[0]["source"][0, :5].tolist())
    assert len(model.preview(Words())) == 3


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"temperature": 1.0, "top_k": 5}])
@pytest.mark.parametrize("preset", ["tiny", "lstm_small"])
def test_batch_generation_equals_one_by_one(preset, settings):
    model = build(preset)
    sources = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    together = model.generate(sources, seed=4, **settings)
    single = [
        model.generate([source], seed=4 + row, **settings)[0] for row, source in enumerate(sources)
    ]
    assert together == single
    assert max(len(own) for (own,) in together) > 1


def test_several_sequences_of_a_source_are_other_draws():
    found = build().generate([[5, 6]], seed=1, num_sequences=3, temperature=1.0)
    assert len(found) == 1
    assert len(found[0]) == 3
    assert len(set(map(tuple, found[0]))) > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "huge"}, r"module\.preset=huge -> unknown"),
        ({"network": {"cell": "gru"}}, r"module\.network\.cell"),
        ({"scores": {"names": ["meteor"]}}, "meteor is unknown"),
        ({"teacher_forcing": {"end": 0.5}}, r"teacher_forcing\.end=0\.5 -> a Transformer"),
        ({"label_smoothing": 1.5}, r"module\.label_smoothing=1\.5 -> "),
        ({"generation": {"num_beams": 0}}, "num_beams=0 -> "),
        ({"generation": {"max_new_tokens": 99}}, "max_new_tokens=99 -> .* 1 to 10 tokens"),
    ],
)
def test_impossible_setting_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings) if "preset" not in settings else EncoderDecoder(**_settings_of(settings))


def _settings_of(settings):
    merged: Any = OmegaConf.to_container(
        OmegaConf.merge(
            FACTS, {"module": OmegaConf.merge(OmegaConf.load(CONFIGURATION), settings)}
        ),
        resolve=True,
    )
    return {key: value for key, value in merged["module"].items() if key != "_target_"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompts": [list(range(1, 14))], "seed": 0}, "its 14 tokens .* more than the 12"),
        ({"prompts": [[1]], "seed": 0, "stop_token": None}, "stop_token=None -> this model has no"),
        ({"prompts": [[1]], "seed": 0, "num_beams": 0}, "num_beams=0 -> "),
        ({"prompts": [[1]], "seed": 0, "num_sequences": 2}, "num_sequences=2 -> .* the same"),
    ],
)
def test_impossible_generation_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        build().generate(**call)
