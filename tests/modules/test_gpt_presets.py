import re

import pytest
import torch

from modules.gpt_networks import GPTNetwork
from modules.gpt_presets import shape_from


def test_presets_have_the_published_sizes():
    sizes = {"gpt2_124m": 124_439_808, "llama_7b": 6_738_415_616}
    for preset, expected in sizes.items():
        overrides = {"num_kv_heads": 32} if preset == "llama_7b" else {}
        vocab_size, length = (50257, 1024) if preset == "gpt2_124m" else (32000, 4096)
        with torch.device("meta"):
            network = GPTNetwork(
                shape_from(preset, overrides), vocab_size=vocab_size, sequence_length=length
            )
        assert sum(p.numel() for p in network.parameters()) == expected


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("gpt2_124", {}, "module.preset=gpt2_124 -> unknown -> did you mean gpt2_124m"),
        ("gpt2_tiny", {"heads": 2}, "network.heads -> no such key -> did you mean num_heads"),
        ("gpt2_tiny", {"width": 130}, "module.network.width=130"),
        ("llama_tiny", {"num_kv_heads": 3}, "module.network.num_kv_heads=3"),
        ("llama_tiny", {"width": 12}, "width/num_heads=3 is odd"),
        ("llama_tiny", {"norm": "batch"}, "module.network.norm=batch -> unknown"),
        ("llama_tiny", {"num_layers": "two"}, "num_layers=two -> it is a whole number"),
        ("llama_tiny", {"num_heads": 0}, "num_heads=0 -> it is a whole number"),
        ("llama_tiny", {"num_heads": "two"}, "num_heads=two -> it is a whole number"),
        ("llama_tiny", {"num_layers": True}, "num_layers=True -> it is a whole number"),
        ("llama_tiny", {"mlp_ratio": "4x"}, "mlp_ratio=4x -> it is a number"),
        ("llama_tiny", {"bias": 1}, "bias=1 -> it is a switch"),
        ("llama_tiny", {"dropout": 1.5}, "dropout=1.5 -> it is a probability"),
    ],
)
def test_impossible_shape_is_refused_by_its_key(preset, overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        shape_from(preset, overrides)


def test_overridden_heads_keep_the_ratio_of_key_value_heads():
    assert shape_from("llama_1b", {"num_heads": 32}).num_kv_heads == 16
    assert shape_from("gpt2_tiny", {"num_heads": 2, "width": None}).num_kv_heads == 2
