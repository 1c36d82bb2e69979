"""Small models of the encoder-decoder family as their YAML gives them, and pairs for them."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from datamodules.batch import IGNORED
from modules.encoder_decoder import EncoderDecoder

CONFIGURATION = Path(__file__).parents[2] / "conf" / "module" / "encoder_decoder.yaml"
FACTS: dict[str, Any] = {
    "data": {
        "vocab_size": 30,
        "target_vocab_size": 30,
        "end_token": 0,
        "start_token": 0,
        "target_end_token": 0,
        "pairs": {"train": 10},
        "source_tokens": {"train": 60},
        "target_tokens": {"train": 50},
    },
    "datamodule": {"max_source_tokens": 12, "max_target_tokens": 10},
    "plan": {"batch_samples": 4, "max_samples": 400, "max_steps": 100, "tokens_per_sample": 1},
    "seed": 3,
}
SMALL: dict[str, dict[str, Any]] = {
    "tiny": {"num_heads": 2, "head_width": 8, "width": 16, "mlp_width": 32},
    "lstm_small": {"embedding_width": 12, "encoder_width": 8, "hidden_width": 16, "dropout": 0.0},
    "gru_attention": {
        "embedding_width": 12,
        "encoder_width": 8,
        "hidden_width": 16,
        "dropout": 0.0,
    },
}


def build(preset="tiny", **overrides: Any) -> EncoderDecoder:
    """A model with its initial values, as Lightning makes it before training."""
    small = {
        "preset": preset,
        "network": SMALL[preset],
        "schedule": {"name": "constant", "final_lr_fraction": None},
    }
    module = OmegaConf.merge(OmegaConf.load(CONFIGURATION), small, overrides)
    composed: Any = OmegaConf.to_container(OmegaConf.merge(FACTS, {"module": module}), resolve=True)
    settings = composed["module"]
    assert settings.pop("_target_") == "modules.encoder_decoder.EncoderDecoder"
    model = EncoderDecoder(**settings)
    model.configure_model()
    return model


def make_batch(lengths=((5, 4), (7, 2), (3, 8), (6, 5)), seed=0) -> dict[str, Any]:
    """Pairs of these source and target lengths, end tokens among them; tokens are 1 to 29."""
    draw = torch.Generator().manual_seed(seed)
    size = max(s for s, _ in lengths), max(t for _, t in lengths)
    source = torch.randint(1, 30, (len(lengths), size[0]), generator=draw)
    targets = torch.randint(1, 30, (len(lengths), size[1]), generator=draw)
    mask = torch.zeros_like(source, dtype=torch.bool)
    for row, (num_source, num_target) in enumerate(lengths):
        source[row, num_source - 1 :], mask[row, :num_source] = 0, True
        targets[row, num_target - 1], targets[row, num_target:] = 0, IGNORED
    inputs = torch.cat([torch.zeros(len(lengths), 1, dtype=torch.long), targets[:, :-1]], 1)
    return {
        "source": source,
        "source_mask": mask,
        "inputs": inputs.clamp(min=0),
        "targets": targets,
        "divisor": (targets != IGNORED).sum().float(),
    }


def part_of(batch, rows, num_parts):  # padded no more than it needs
    part = {key: batch[key][rows] for key in ("source", "source_mask", "inputs", "targets")}
    length = int(part["source_mask"].sum(1).max())
    part |= {key: part[key][:, :length] for key in ("source", "source_mask")}
    length = int((part["targets"] != IGNORED).sum(1).max())
    part |= {key: part[key][:, :length] for key in ("inputs", "targets")}
    return {**part, "divisor": batch["divisor"] / num_parts}
