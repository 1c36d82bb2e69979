"""The encoder-decoder transformer beside those of other libraries."""

import math

import pytest
import torch
import torch.nn.functional as F

from modules.decoding import decode
from modules.positions import relative_buckets
from tests.modules.small_transformers import TARGET_LENGTH, make_network, pair, to_transformers_t5


@pytest.mark.parametrize(
    "overrides",
    [{}, {"activation": "relu", "tie_head": True}, {"decoder_layers": 3}],
    ids=["v1.1", "v1.0", "deeper decoder"],
)
def test_logits_equal_transformers_t5(overrides):
    network = make_network("t5_v1_1_base", **overrides)
    source, mask, inputs, _ = pair()
    with torch.no_grad():
        ours = network(source, mask, inputs)
        model = to_transformers_t5(network)
        theirs = model(input_ids=source, attention_mask=mask, decoder_input_ids=inputs).logits
        unmasked = model(input_ids=source, decoder_input_ids=inputs).logits
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours[1], unmasked[1], atol=1e-2)


PAD, STOP, START = 0, 1, 2


@pytest.mark.parametrize(("num_beams", "length_penalty"), [(1, 1.0), (4, 0.6), (3, 0.2)])
def test_targets_equal_those_of_transformers_t5(num_beams, length_penalty):
    network = make_network("t5_v1_1_base")
    with torch.no_grad():  # so that some targets end before they have to
        network.head.weight[STOP] = network.head.weight[:12].mean(0) * 4
    source, mask, _, _ = pair()
    ours = decode(
        network, source, mask, start_token=START, stop_token=STOP, max_new_tokens=TARGET_LENGTH,
        num_beams=num_beams, length_penalty=length_penalty, temperature=0.0, top_k=0, top_p=1.0,
        seed=0,
    )  # fmt: skip
    tokens = {"pad_token_id": PAD, "eos_token_id": STOP, "decoder_start_token_id": START}
    model = to_transformers_t5(network, **tokens)
    theirs = model.generate(
        input_ids=source, attention_mask=mask.long(), do_sample=False, early_stopping=False,
        max_new_tokens=TARGET_LENGTH, num_beams=num_beams,
        **({"length_penalty": length_penalty} if num_beams > 1 else {}),
    )  # fmt: skip
    rows = [row[1:] for row in theirs.tolist()]
    assert ours == [row[: row.index(STOP)] if STOP in row else row for row in rows]
    assert len({len(target) for target in ours}) > 1
    assert len(set(map(tuple, ours))) == 3


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_buckets_equal_transformers(bidirectional):
    from transformers.models.t5.modeling_t5 import T5Attention

    places = torch.arange(300)
    ours = relative_buckets(
        places, places, num_buckets=32, max_distance=128, bidirectional=bidirectional
    )
    distance = places[None, :] - places[:, None]
    assert torch.equal(
        ours, T5Attention._relative_position_bucket(distance, bidirectional, 32, 128)
    )


def test_post_norm_equals_torch_transformer():
    network = make_network("vaswani_small", head_width=8)
    reference = torch.nn.Transformer(32, 4, 2, 2, 40, dropout=0.0, batch_first=True)
    reference.encoder.norm = reference.decoder.norm = None
    pairs = [*zip(network.encoder_blocks, reference.encoder.layers, strict=True)]
    pairs += zip(network.decoder_blocks, reference.decoder.layers, strict=True)
    for block, theirs in pairs:  # in training mode: evaluation takes nested tensors, which warn
        copy_torch_block(block, theirs)
    with torch.no_grad():
        source, mask, inputs, _ = pair()
        sides = (
            (source, network.source_embedding, network.source_position_embedding),
            (inputs, network.embedding, network.position_embedding),
        )
        embedded = [e(x) * math.sqrt(32) + p.weight[: x.size(1)] for x, e, p in sides]
        causal = torch.ones(inputs.size(1), inputs.size(1)).triu(1).bool()
        hidden = reference(
            *embedded, tgt_mask=causal,
            src_key_padding_mask=~mask, memory_key_padding_mask=~mask,
        )  # fmt: skip
        ours = network(source, mask, inputs)
        torch.testing.assert_close(ours, network.head(hidden), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def copy_torch_block(block, theirs):
    attentions = [(block.attention, theirs.self_attn)]
    norms = [block.attention_norm, block.mlp_norm]
    if hasattr(theirs, "multihead_attn"):
        attentions.append((block.cross_attention, theirs.multihead_attn))
        norms.insert(1, block.cross_attention_norm)
    for ours, mixer in attentions:
        parts = (ours.query, ours.key, ours.value)
        mixer.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        mixer.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        mixer.out_proj.load_state_dict(ours.output.state_dict())
    theirs.linear1.load_state_dict(block.mlp.up.state_dict())
    theirs.linear2.load_state_dict(block.mlp.output.state_dict())
    for index, norm in enumerate(norms, 1):
        getattr(theirs, f"norm{index}").load_state_dict(norm.state_dict())


def test_gradients_equal_transformers_t5():
    network = make_network("t5_v1_1_base")
    model = to_transformers_t5(network)
    source, mask, inputs, targets = pair()
    network(source, mask, inputs, targets).backward()
    logits = model(input_ids=source, attention_mask=mask, decoder_input_ids=inputs).logits
    F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    theirs = model.encoder.block[0].layer[0].SelfAttention
    block = network.encoder_blocks[0].attention
    for ours, reference in (
        (network.embedding.weight.grad, model.shared.weight.grad),
        (network.encoder_relative_bias.weight.grad, theirs.relative_attention_bias.weight.grad),
        (block.key.weight.grad, theirs.k.weight.grad),
        (block.query.weight.grad * math.sqrt(12), theirs.q.weight.grad),
    ):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)
