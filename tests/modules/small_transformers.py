"""Small encoder-decoder transformers, pairs for them, and T5s with the same weights."""

from typing import Any

import torch
import torch.nn.functional as F

from datamodules.batch import IGNORED
from modules.encoder_decoder_networks import TransformerNetwork
from modules.encoder_decoder_presets import PRESETS
from modules.presets import choose

SMALL: dict[str, Any] = dict(
    encoder_layers=2, decoder_layers=2, num_heads=4, head_width=12, width=32, mlp_width=40
)
FORMS: dict[str, dict[str, Any]] = {
    "t5_v1_1_base": {"relative_buckets": 8, "relative_distance": 10},
    "base": {},
    "vaswani_small": {},
    "sinusoidal": {"positions": "sinusoidal", "tie_head": True},
}
VOCAB_SIZE, SOURCE_LENGTH, TARGET_LENGTH = 50, 24, 16


def make_network(form, **overrides: Any) -> Any:
    """A small network in evaluation mode, every parameter moved from where it starts."""
    preset = "vaswani_small" if form == "sinusoidal" else form
    network = TransformerNetwork(
        choose(PRESETS, preset, SMALL | FORMS[form] | overrides),
        source_vocab=VOCAB_SIZE,
        target_vocab=VOCAB_SIZE,
        source_length=SOURCE_LENGTH,
        target_length=TARGET_LENGTH,
    )
    network.initialise(seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return network.eval()


def pair(lengths=(18, 7, 12), target_length=12, seed=0) -> Any:
    """Sources of these lengths with their mask, target inputs, and targets that end early."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(lengths)
    source = torch.randint(1, VOCAB_SIZE, (rows, max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    inputs, targets = torch.randint(VOCAB_SIZE, (2, rows, target_length), generator=generator)
    targets[0, 8:] = IGNORED
    return source * mask, mask, inputs, targets


def pad(x, amount, value):
    return F.pad(x, (0, amount), value=value)


@torch.no_grad()
def to_transformers_t5(network, **config):
    """Make transformers' T5 with the weights of a network of its form, the head tied or not.

    `config` goes to `T5Config`: tokens to start, stop and pad with, say.
    """
    from transformers import T5Config, T5ForConditionalGeneration

    shape = network.shape
    gated = shape.activation == "geglu"
    settings: Any = T5Config(
        vocab_size=network.embedding.num_embeddings, d_model=shape.width,
        d_kv=shape.head_width, d_ff=shape.mlp_width, num_layers=shape.encoder_layers,
        num_decoder_layers=shape.decoder_layers, num_heads=shape.num_heads,
        relative_attention_num_buckets=shape.relative_buckets,
        relative_attention_max_distance=shape.relative_distance, dropout_rate=shape.dropout,
        layer_norm_epsilon=shape.norm_epsilon,
        feed_forward_proj="gated-gelu" if gated else "relu", **config,
    )  # fmt: skip
    # Not as an argument, which transformers 5 takes for the scale alone: it ties heads then too.
    settings.tie_word_embeddings = settings.scale_decoder_outputs = shape.tie_head
    model: Any = T5ForConditionalGeneration(settings).eval()
    model.set_input_embeddings(model.shared)  # for both stacks, which an untied head would undo
    model.shared.weight.copy_(network.embedding.weight)
    # A tied T5 divides what its head sees by sqrt(D); the gain of the norm before makes up for it.
    scale = shape.width**0.5 if shape.tie_head else 1.0
    model.decoder.final_layer_norm.weight.copy_(network.decoder_norm.weight * scale)
    model.encoder.final_layer_norm.weight.copy_(network.encoder_norm.weight)
    if not shape.tie_head:
        model.lm_head.weight.copy_(network.head.weight)
    for stack, blocks, bias in (
        (model.encoder, network.encoder_blocks, network.encoder_relative_bias),
        (model.decoder, network.decoder_blocks, network.decoder_relative_bias),
    ):
        first = stack.block[0].layer[0].SelfAttention
        first.relative_attention_bias.weight.copy_(bias.weight)
        for block, theirs in zip(blocks, stack.block, strict=True):
            _copy_t5_block(block, list(theirs.layer), gated, shape.head_width)
    return model


def _copy_t5_block(block, layers, gated, head_width):
    branches = [(block.attention, block.attention_norm, layers[0].SelfAttention)]
    if len(layers) == 3:
        branches.append(
            (block.cross_attention, block.cross_attention_norm, layers[1].EncDecAttention)
        )
    for (attention, norm, theirs), layer in zip(branches, layers[:-1], strict=True):
        theirs.q.weight.copy_(attention.query.weight / head_width**0.5)  # theirs does not scale
        theirs.k.weight.copy_(attention.key.weight)
        theirs.v.weight.copy_(attention.value.weight)
        theirs.o.weight.copy_(attention.output.weight)
        layer.layer_norm.weight.copy_(norm.weight)
    mlp = layers[-1].DenseReluDense
    (mlp.wi_1 if gated else mlp.wi).weight.copy_(block.mlp.up.weight)
    if gated:
        mlp.wi_0.weight.copy_(block.mlp.gate.weight)
    mlp.wo.weight.copy_(block.mlp.output.weight)
    layers[-1].layer_norm.weight.copy_(block.mlp_norm.weight)
