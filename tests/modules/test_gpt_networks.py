import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from modules.gpt_networks import GPTNetwork, initial_value
from modules.gpt_presets import PRESETS, shape_from

SMALL: dict[str, Any] = dict(num_layers=2, num_heads=4, width=32)
VOCAB_SIZE, LENGTH = 50, 16


def make_network(preset, **overrides: Any) -> Any:
    shape = shape_from(preset, SMALL | overrides)
    network = GPTNetwork(shape, vocab_size=VOCAB_SIZE, sequence_length=LENGTH)
    network.initialise(seed=1)
    return network.eval()


def stir(network):
    """Moves every parameter, so that none that starts at 0 or 1 hides an error."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return network


def tokens(rows=2, length=LENGTH, seed=0):
    return torch.randint(VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(seed))


def copy_linear(source, target, transposed=False):
    target.weight.copy_(source.weight.T if transposed else source.weight)
    if source.bias is not None:
        target.bias.copy_(source.bias)


@torch.no_grad()
def to_transformers_gpt2(network):
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = network.shape
    model: Any = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB_SIZE, n_positions=LENGTH, n_embd=shape.width,
            n_layer=shape.num_layers, n_head=shape.num_heads, bos_token_id=0, eos_token_id=0,
        )
    ).eval()  # fmt: skip
    body = model.transformer
    body.wte.weight.copy_(network.embedding.weight)
    body.wpe.weight.copy_(network.position_embedding.weight)
    copy_linear(network.norm, body.ln_f)
    for block, theirs in zip(network.blocks, body.h, strict=True):
        mixer = block.attention
        parts = (mixer.query, mixer.key, mixer.value)
        theirs.attn.c_attn.weight.copy_(torch.cat([part.weight for part in parts]).T)
        theirs.attn.c_attn.bias.copy_(torch.cat([part.bias for part in parts]))
        copy_linear(mixer.output, theirs.attn.c_proj, transposed=True)
        copy_linear(block.mlp.up, theirs.mlp.c_fc, transposed=True)
        copy_linear(block.mlp.output, theirs.mlp.c_proj, transposed=True)
        copy_linear(block.attention_norm, theirs.ln_1)
        copy_linear(block.mlp_norm, theirs.ln_2)
    return model


@torch.no_grad()
def to_transformers_llama(network):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = network.shape
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE, hidden_size=shape.width, intermediate_size=shape.mlp_width,
            num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads, max_position_embeddings=LENGTH,
            rms_norm_eps=1e-5,
        )
    ).eval()  # fmt: skip
    body = model.model
    body.embed_tokens.weight.copy_(network.embedding.weight)
    body.norm.weight.copy_(network.norm.weight)
    model.lm_head.weight.copy_(network.head.weight)
    for block, theirs in zip(network.blocks, body.layers, strict=True):
        copy_linear(block.attention.query, theirs.self_attn.q_proj)
        copy_linear(block.attention.key, theirs.self_attn.k_proj)
        copy_linear(block.attention.value, theirs.self_attn.v_proj)
        copy_linear(block.attention.output, theirs.self_attn.o_proj)
        copy_linear(block.mlp.gate, theirs.mlp.gate_proj)
        copy_linear(block.mlp.up, theirs.mlp.up_proj)
        copy_linear(block.mlp.output, theirs.mlp.down_proj)
        theirs.input_layernorm.weight.copy_(block.attention_norm.weight)
        theirs.post_attention_layernorm.weight.copy_(block.mlp_norm.weight)
    return model


@pytest.mark.parametrize(
    ("preset", "overrides", "convert"),
    [
        ("gpt2_tiny", {}, to_transformers_gpt2),
        ("llama_tiny", {"num_kv_heads": 4}, to_transformers_llama),
        ("llama_tiny", {"num_kv_heads": 2}, to_transformers_llama),
    ],
)
def test_logits_equal_transformers(preset, overrides, convert):
    network = stir(make_network(preset, **overrides))
    with torch.no_grad():
        ours, theirs = network(tokens()), convert(network)(tokens()).logits
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_loss_is_cross_entropy_of_the_logits():
    for preset in ("gpt2_tiny", "modern_tiny"):
        network = stir(make_network(preset))
        targets = tokens(seed=1)
        loss = network(tokens(), targets)
        reference = F.cross_entropy(network(tokens()).flatten(0, 1), targets.flatten())
        torch.testing.assert_close(loss, reference)


def test_tied_embedding_has_one_name_and_gets_both_gradients():
    network = make_network("gpt2_tiny")
    assert "head.weight" not in network.state_dict()
    network(tokens(), tokens(seed=1)).backward()
    unseen = [i for i in range(VOCAB_SIZE) if i not in tokens()]
    assert network.embedding.weight.grad[unseen].abs().min() > 0  # as the head
    assert "head.weight" in make_network("gpt2_tiny", tie_embeddings=False).state_dict()


def test_logit_softcap_bounds_logits():
    network, free = (stir(make_network("modern_tiny", logit_softcap=cap)) for cap in (1.5, 0.0))
    with torch.no_grad():
        capped, logits = network(tokens()), free(tokens())
    assert logits.abs().max() > 1.5 > capped.abs().max()
    torch.testing.assert_close(capped, 1.5 * torch.tanh(logits / 1.5))


def test_qk_norm_makes_logits_independent_of_the_scale_of_queries():
    for qk_norm in (True, False):
        network = stir(make_network("modern_tiny", qk_norm=qk_norm))
        with torch.no_grad():
            before = network(tokens())
            for block in network.blocks:
                block.attention.query.weight.mul_(100)
            after = network(tokens())
        # Not exact: the norm's epsilon weighs less against larger queries.
        assert torch.allclose(before, after, atol=1e-3) == qk_norm


@pytest.mark.parametrize("preset", ["gpt2_tiny", "llama_tiny", "modern_tiny"])
def test_packed_row_equals_its_documents_alone(preset):
    network = stir(make_network(preset))
    row = tokens(rows=1)
    documents = torch.tensor([[0] * 5 + [1] * 8 + [2] * 3], dtype=torch.int32)
    with torch.no_grad():
        packed, unmasked = network(row, documents=documents), network(row)
        alone = torch.cat([network(part) for part in row.split([5, 8, 3], dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(unmasked, alone, atol=1e-2)


@pytest.mark.parametrize("preset", ["gpt2_tiny", "llama_tiny", "modern_tiny"])
def test_every_parameter_gets_a_gradient(preset):
    network = stir(make_network(preset))
    network(tokens(), tokens(seed=1)).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        if not name.endswith("key.bias"):  # which moves all scores of a query alike
            assert parameter.grad.any(), name


def test_dropout_acts_in_training_only():
    network = stir(make_network("gpt2_tiny", dropout=0.5))
    assert torch.equal(network(tokens()), network(tokens()))
    network.train()
    assert not torch.equal(network(tokens()), network(tokens()))


def test_initial_values_depend_on_seed_and_name_alone():
    network = make_network("modern_tiny")
    torch.rand(7)  # the global generator has no part in it
    deeper = make_network("modern_tiny", num_layers=3).state_dict()
    for name, value in network.state_dict().items():
        assert torch.equal(value, deeper[name]), name
        assert torch.equal(value, initial_value(network.shape, name, value.shape, seed=1))
    weight = network.embedding.weight
    name, shape = "embedding.weight", network.shape
    assert not torch.equal(weight, initial_value(shape, name, weight.shape, seed=2))
    layers = [deeper[f"blocks.{i}.mlp.up.weight"] for i in range(2)]
    assert not torch.equal(*layers)


def test_initial_values_have_the_scheme_s_deviations():
    gpt2, modern = PRESETS["gpt2_tiny"], PRESETS["modern_tiny"]
    size = torch.Size([256, 128])
    for shape, name, deviation in (
        (gpt2, "embedding.weight", 0.02),
        (gpt2, "blocks.0.attention.query.weight", 0.02),
        (gpt2, "blocks.3.mlp.output.weight", 0.02 / math.sqrt(8)),
        (modern, "embedding.weight", 1.0),
        (modern, "head.weight", 0.001),
        (modern, "blocks.0.mlp.up.weight", 1 / math.sqrt(128)),
        (modern, "blocks.0.attention.output.weight", 0.0),
        (replace(modern, tie_embeddings=True), "embedding.weight", 0.02),
    ):
        value = initial_value(shape, name, size, seed=1)
        assert value.std().item() == pytest.approx(deviation, rel=0.02), name
    assert initial_value(gpt2, "norm.weight", size, seed=1).eq(1).all()
    assert not initial_value(gpt2, "norm.bias", size, seed=1).any()
