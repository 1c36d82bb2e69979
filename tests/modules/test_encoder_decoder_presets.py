import re
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modules.encoder_decoder_networks import TransformerNetwork, initial_value
from modules.encoder_decoder_presets import PRESETS, flops
from modules.presets import choose


def on_meta(preset, source_vocab, target_vocab) -> Any:
    with torch.device("meta"):
        return TransformerNetwork(
            PRESETS[preset],
            source_vocab=source_vocab,
            target_vocab=target_vocab,
            source_length=100,
            target_length=100,
        )


def test_presets_have_the_published_sizes():
    from transformers import T5Config, T5ForConditionalGeneration

    config: Any = T5Config(
        vocab_size=32128, d_model=768, d_kv=64, d_ff=2048, num_layers=12, num_heads=12,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    with torch.device("meta"):
        theirs = T5ForConditionalGeneration(config)  # whose head is tied
    published = sum(p.numel() for p in theirs.parameters()) + theirs.lm_head.weight.numel()
    network = on_meta("t5_v1_1_base", 32128, 32128)
    assert sum(p.numel() for p in network.parameters()) == published == 247_577_856
    tutorial = on_meta("vaswani_small", 7853, 5893)
    assert sum(p.numel() for p in tutorial.parameters()) == 9_038_341


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("t5_v1_base", {}, "module.preset=t5_v1_base -> unknown -> did you mean t5_v1_1_base"),
        ("tiny", {"heads": 2}, "network.heads -> no such key -> did you mean num_heads"),
        ("tiny", {"head_width": 15}, "module.network.head_width=15 -> positions=rope"),
        ("tiny", {"width": 15, "positions": "sinusoidal"}, "module.network.width=15"),
        ("small", {"relative_buckets": 30}, "module.network.relative_buckets=30"),
        ("small", {"relative_distance": 16}, "choose more than 16"),
        ("small", {"norm_position": "both"}, "network.norm_position=both -> unknown"),
    ],
)
def test_impossible_shape_is_refused_by_its_key(preset, overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        choose(PRESETS, preset, overrides)


def test_one_table_for_two_vocabularies_is_refused():
    with pytest.raises(ValueError, match=r"share_embeddings=true -> the source has 20 tokens"):
        on_meta("tiny", 20, 30)


@pytest.mark.parametrize("preset", ["small", "vaswani_small", "tied"])
def test_flops_equal_a_count_of_the_operations(preset):
    small: dict[str, Any] = {"encoder_layers": 2, "decoder_layers": 3, "dropout": 0.0}
    if preset == "tied":
        preset, small = "small", small | {"tie_head": True}
    shape = choose(PRESETS, preset, small)
    network = TransformerNetwork(
        shape, source_vocab=40, target_vocab=40, source_length=24, target_length=16
    )
    sizes = {name: parameter.shape for name, parameter in network.named_parameters()}
    source, targets = torch.ones(1, 24, dtype=torch.int64), torch.ones(1, 16, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(source, source.bool(), targets, targets).backward()
    matrices = {name: size for name, size in sizes.items() if len(size) == 2}
    # The causal half that is left out, and counted by torch.
    half = 6 * 3 * 16**2 * shape.num_heads * shape.head_width
    assert flops(shape, matrices, 24, 16) + half == counter.get_total_flops()
    assert 1 < flops(shape, sizes, 24, 16) / flops(shape, matrices, 24, 16) < 1.01


@pytest.mark.parametrize(
    ("preset", "name", "deviation"),
    [
        ("small", "embedding.weight", 1.0),
        ("small", "head.weight", 512**-0.5),
        ("small", "encoder_relative_bias.weight", 512**-0.5),
        ("small", "decoder_blocks.1.cross_attention.query.weight", 128**-0.5),
        ("small", "decoder_blocks.1.mlp.output.weight", 128**-0.5),
        ("tied", "embedding.weight", 512**-0.5),
        ("tied", "source_embedding.weight", 1.0),
        ("base", "embedding.weight", 1.0),
        ("base", "head.weight", 0.001),
        ("base", "encoder_blocks.0.mlp.up.weight", 128**-0.5),
        ("base", "decoder_blocks.1.cross_attention.output.weight", 0.0),
        ("vaswani_small", "source_embedding.weight", (2 / 384) ** 0.5),
        ("vaswani_small", "encoder_blocks.0.attention.output.weight", (2 / 384) ** 0.5),
    ],
)
def test_initial_values_have_the_scheme_s_deviations(preset, name, deviation):
    shape = choose(PRESETS, "small", {"tie_head": True}) if preset == "tied" else PRESETS[preset]
    value = initial_value(shape, name, torch.Size([256, 128]), seed=1)
    assert value.std().item() == pytest.approx(deviation, rel=0.02)


def test_initial_gains_are_one_and_biases_zero():
    shape, size = PRESETS["vaswani_small"], torch.Size([8])
    assert initial_value(shape, "encoder_blocks.0.mlp_norm.weight", size, seed=1).eq(1).all()
    assert not initial_value(shape, "encoder_blocks.0.mlp_norm.bias", size, seed=1).any()
    assert not initial_value(shape, "head.bias", size, seed=1).any()
