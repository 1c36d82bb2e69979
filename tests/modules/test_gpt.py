import math
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from modules.gpt import GPT

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    # Lightning 2.6 with torch 2.13.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]

CONFIGURATION = Path(__file__).parents[2] / "conf" / "module" / "gpt.yaml"
FACTS: dict[str, Any] = {
    "data": {
        "vocab_size": 40,
        "end_token": 7,
        "bytes_per_token": {"train": 3.0, "val": 2.0, "test": 4.0},
    },
    "datamodule": {"sequence_length": 16},
    "plan": {"batch_samples": 4, "max_samples": 40, "max_steps": 10, "tokens_per_sample": 16},
    "seed": 3,
}
SMALL: dict[str, Any] = {
    "preset": "gpt2_tiny",
    "network": {"num_layers": 2, "num_heads": 2, "width": 16},
}


def make_settings(**overrides: Any) -> dict[str, Any]:
    """The arguments that conf/module/gpt.yaml gives, with `overrides` merged in."""
    module = OmegaConf.merge(OmegaConf.load(CONFIGURATION), SMALL, overrides)
    composed = OmegaConf.merge(FACTS, {"module": module})
    container: Any = OmegaConf.to_container(composed, resolve=True)
    settings = container["module"]
    assert settings.pop("_target_") == "modules.gpt.GPT"
    return settings


def build_model(**settings: Any) -> GPT:
    """A model with its initial values, as Lightning makes it before training."""
    model = GPT(**settings)
    model.configure_model()
    return model


def make_batch(rows=4, seed=0) -> Any:
    row = torch.randint(40, (rows, 17), generator=torch.Generator().manual_seed(seed))
    return {"inputs": row[:, :-1], "targets": row[:, 1:].clone()}


class Letters:
    """A tokenizer of capital letters."""

    class Encoding:
        def __init__(self, ids):
            self.ids = ids

    def encode(self, sequence):
        return self.Encoding([ord(letter) - 65 for letter in sequence if letter.isupper()])

    def decode(self, ids):
        return "".join(chr(65 + token) for token in ids)


def make_trainer(**settings: Any):
    return lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **settings,
    )  # fmt: skip


def loader(batches):
    return DataLoader(batches, batch_size=None)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd", "adamw_rms", "adafactor"])
@pytest.mark.parametrize("preset", ["gpt2_tiny", "llama_tiny", "modern_tiny"])
def test_training_lowers_the_loss(preset, optimizer):
    rate = {"sgd": 0.05, "adamw_rms": 0.1, "adafactor": 0.1}.get(optimizer, 1e-2)
    model = build_model(**make_settings(preset=preset, optimizer={"name": optimizer, "lr": rate}))
    configured = model.configure_optimizers()["optimizer"]  # pyright: ignore
    batch, losses = make_batch(), []
    for index in range(10):
        result = model.training_step(batch, index)
        total, weight = result["train/loss"]
        assert torch.equal(result["loss"], total / weight)  # nothing is ignored here
        assert not total.requires_grad
        result["loss"].backward()
        configured.step()
        configured.zero_grad()
        losses.append(result["loss"].item())
    assert losses[0] == pytest.approx(math.log(40), abs=0.2)
    # Relative rates lift matrices slowly that begin as zeros.
    assert losses[-1] < losses[0] - (0.1 if optimizer in ("adamw", "muon") else 0.01)


def test_training_loss_weighs_tokens_alike_over_micro_batches():
    model = build_model(**make_settings())
    whole = make_batch()
    whole["targets"][0, :12] = -100  # the first half has fewer targets than the second
    halves: list[Any] = [
        {key: value[part] for key, value in whole.items()} for part in (slice(2), slice(2, 4))
    ]
    of_whole = model.training_step(whole, 0)["loss"]
    of_halves = [model.training_step(half, 0) for half in halves]
    torch.testing.assert_close(of_whole, (of_halves[0]["loss"] + of_halves[1]["loss"]) / 2)
    totals, weights = zip(*(result["train/loss"] for result in of_halves), strict=True)
    logged = sum(totals) / sum(weights)
    assert logged == pytest.approx(of_whole.item() * 64 / 52)  # over the targets that count
    mean = sum(total / weight for total, weight in zip(totals, weights, strict=True)) / 2
    assert abs(logged - mean) > 1e-4 * mean  # what a mean over each half's targets would give


def evaluation_batches():
    batches = [make_batch(seed=1), make_batch(rows=2, seed=2), make_batch(seed=3)]
    batches[1]["targets"][:, ::3] = -100
    batches[2]["targets"][1:] = -100  # rows that only pad the last batch
    batches.append({key: value.clone() for key, value in batches[2].items()})
    batches[3]["targets"][:] = -100
    return batches


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_counts_every_target_once(split):
    model = build_model(**make_settings())
    batches, nats, count = evaluation_batches(), 0.0, 0
    with torch.no_grad():
        for batch in batches:
            targets = batch["targets"].flatten()
            logits = model.network(batch["inputs"]).flatten(0, 1)
            nats += F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum").item()
            count += int((targets != -100).sum())
    trainer = make_trainer()
    run = trainer.validate if split == "val" else trainer.test
    (logged,) = run(model, loader(batches), verbose=False)
    loss = nats / count
    bytes_per_token = FACTS["data"]["bytes_per_token"][split]
    assert logged == pytest.approx(
        {
            f"{split}/loss": loss,
            f"{split}/perplexity": math.exp(loss),
            f"{split}/bits_per_byte": loss / math.log(2) / bytes_per_token,
        },
        rel=1e-6,
    )


def test_diverged_model_evaluates_to_nan():
    model = build_model(**make_settings())
    torch.nn.init.constant_(model.network.embedding.weight, torch.nan)
    (logged,) = make_trainer().validate(model, loader([make_batch()]), verbose=False)
    assert math.isnan(logged["val/loss"])


def test_unknown_bytes_per_token_leave_bits_per_byte_out():
    model = build_model(**make_settings(bytes_per_token=None))
    (logged,) = make_trainer().validate(model, loader([make_batch()]), verbose=False)
    assert sorted(logged) == ["val/loss", "val/perplexity"]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
def test_lightning_clips_and_schedules(optimizer, precision):
    settings = make_settings(optimizer={"name": optimizer}, schedule={"warmup_samples": 20})
    model = build_model(**settings)
    trainer = make_trainer(max_steps=3, gradient_clip_val=1.0, precision=precision)
    batches = loader([make_batch(seed=i) for i in range(3)])
    trainer.fit(model, batches)
    multiplier = 16 / 20  # of step 3, which starts after 12 samples
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(6e-4 * multiplier)
    assert trainer.global_step == 3


@pytest.mark.parametrize("preset", ["gpt2_tiny", "llama_tiny", "modern_tiny"])
def test_roles_hold_every_parameter_once(preset):
    model = build_model(**make_settings(preset=preset))
    names = {id(parameter): name for name, parameter in model.network.named_parameters()}
    roles = model.parameters_by_role()
    assert sorted(id(p) for group in roles.values() for p in group) == sorted(names)
    assert all(".attention." in names[id(p)] or ".mlp." in names[id(p)] for p in roles["matrix"])
    assert all(p.ndim == 2 for p in roles["matrix"])
    tied = preset == "gpt2_tiny"
    assert [names[id(p)] for p in roles["head"]] == ["embedding.weight" if tied else "head.weight"]
    assert len(roles["embedding"]) == (0 if tied else 1)


@pytest.mark.parametrize("preset", ["gpt2_tiny", "llama_tiny", "modern_tiny"])
def test_flops_equal_those_that_torch_counts(preset):
    model = build_model(**make_settings(preset=preset))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.training_step(make_batch(rows=1), 0)["loss"].backward()
    half_of_attention = 6 * 2 * 16**2 * 16  # which torch counts whole
    vectors = sum(p.numel() for p in model.network.parameters() if p.ndim < 2)  # no products
    assert counter.get_total_flops() == model.flops_per_sample() + half_of_attention - 96 * vectors


@pytest.mark.parametrize("preset", ["gpt2_tiny", "llama_tiny", "modern_tiny"])
def test_bf16_weights_train_and_generate(preset):
    model = build_model(**make_settings(preset=preset))
    expected = model.training_step(make_batch(), 0)["loss"]
    model.bfloat16()
    loss = model.training_step(make_batch(), 0)["loss"]
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-2)
    assert len(model.preview(Letters())[0]["text"]) > 0


def test_blocks_are_the_layers():
    model = build_model(**make_settings())
    assert model.blocks == list(model.network.blocks)
    assert len(model.blocks) == 2


def test_preview_continues_each_prompt_and_repeats():
    model = build_model(
        **make_settings(preview={"prompts": ["AB", ""], "num_sequences": 2, "max_new_tokens": 30})
    )
    model.train()
    rows = model.preview(Letters())
    assert [row["prompt"] for row in rows] == ["AB", "AB", "", ""]
    assert rows == model.preview(Letters())
    assert any(row["text"] for row in rows)
    assert not any("H" in row["text"] for row in rows)  # the stop token, 7
    assert model.training
    assert model.network.training


def test_preview_of_an_empty_prompt_without_end_token_is_refused():
    model = build_model(**make_settings(preview={"prompts": [""], "stop_token": None}))
    with pytest.raises(ValueError, match=r"module\.preview\.prompts=\[''\]"):
        model.preview(Letters())


def test_configuration_lists_every_key():
    settings = make_settings()
    assert set(settings["network"]) == {
        name for name in build_model(**settings).network.shape.__dataclass_fields__
    }
