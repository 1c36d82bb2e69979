"""Small recurrent networks, their batches, and the same network of torch's cells, for tests."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from modules.encoder_decoder_recurrent import RecurrentNetwork
from modules.encoder_decoder_recurrent_presets import PRESETS
from modules.presets import choose

SMALL: dict[str, Any] = dict(embedding_width=6, encoder_width=5, hidden_width=8, dropout=0.0)
SOURCE_VOCAB, TARGET_VOCAB, SOURCE_LENGTH, TARGET_LENGTH = 11, 13, 9, 7
LENGTHS = [5, 9, 1]
SHAPES = {
    "lstm": ("lstm_small", {}),
    "gru": ("gru_attention", {}),
    "deep_gru": ("gru_attention", {"num_layers": 2, "attention": "none"}),
    "deep_lstm_attention": ("lstm_small", {"attention": "additive"}),
}


def make_network(name, stirred=True, device="cpu", **overrides: Any) -> Any:
    preset, own = SHAPES[name]
    with torch.device(device):
        network = RecurrentNetwork(
            choose(PRESETS, preset, SMALL | own | overrides),
            source_vocab=SOURCE_VOCAB,
            target_vocab=TARGET_VOCAB,
            source_length=SOURCE_LENGTH,
            target_length=TARGET_LENGTH,
        )
    if device == "cpu":
        network.initialise(seed=1)
    if stirred:  # so that attention and biases matter
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.6)
    return network.eval()


def tokens(*size, vocab=TARGET_VOCAB, seed=0):
    return torch.randint(vocab, size, generator=torch.Generator().manual_seed(seed))


def make_batch(seed=0):
    source = tokens(len(LENGTHS), SOURCE_LENGTH, vocab=SOURCE_VOCAB, seed=seed)
    mask = torch.arange(SOURCE_LENGTH) < torch.tensor(LENGTHS).unsqueeze(1)
    return source, mask, tokens(len(LENGTHS), TARGET_LENGTH, seed=seed + 1)


def close(one, other, tolerance=1e-5):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# -- an independent network: torch's cells, one row at a time, no padding --------------------------


def cell_of(shape, module, name):
    """A cell of torch that has the network's own weights, so that gradients can be compared."""
    make = nn.LSTMCell if shape.cell == "lstm" else nn.GRUCell
    cell = make(1, getattr(module, f"weight_hh_{name}").size(1))
    cell.input_size = getattr(module, f"weight_ih_{name}").size(1)
    for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        setattr(cell, kind, getattr(module, f"{kind}_{name}"))
    return cell


def run_cell(cell, inputs):
    """States after each of the inputs, each a tuple."""
    states, state = [], None
    for x in inputs:
        new = cell(x.unsqueeze(0), state)
        state = new
        states.append(new if isinstance(new, tuple) else (new,))
    return states


def reference_encoder(network, row):
    """Memory [S, M] and states [layer][kind] of one row of tokens."""
    shape, encoder = network.shape, network.encoder
    xs, states = list(encoder.embedding[row]), []
    for layer in range(shape.num_layers):
        forward = run_cell(cell_of(shape, encoder, f"l{layer}"), xs)
        backward = run_cell(cell_of(shape, encoder, f"l{layer}_reverse"), xs[::-1])
        kinds = []
        for n, kind in enumerate(shape.states):
            both = torch.cat([forward[-1][n], backward[-1][n]], dim=1)
            first = both @ getattr(encoder, f"{kind}_bridge_weight_l{layer}").T
            first = first + getattr(encoder, f"{kind}_bridge_bias_l{layer}")
            kinds.append(first.tanh() if kind == "hidden" else first)
        states.append(kinds)
        pairs = zip(forward, backward[::-1], strict=True)
        xs = [torch.cat([one[0], other[0]], dim=1)[0] for one, other in pairs]
    return torch.stack(xs), states


def reference_logits(network, row, inputs, is_fed):
    """Logits [T, V] of one row, written as the tutorials write it."""
    shape, decoder = network.shape, network.decoder
    memory, states = reference_encoder(network, row)
    cells = [cell_of(shape, decoder, f"l{layer}") for layer in range(shape.num_layers)]
    logits: list[Any] = []
    for step, token in enumerate(inputs):
        fed = token if is_fed[step] else logits[-1].argmax()
        x = embedded = decoder.embedding[fed].unsqueeze(0)
        context = None
        if shape.attention == "additive":
            weight = torch.cat([decoder.attention_query, decoder.attention_key], dim=1)
            query = states[-1][0].expand(len(memory), -1)
            energy = F.linear(torch.cat([query, memory], 1), weight, decoder.attention_bias).tanh()
            weights = (energy * decoder.attention_score).sum(1).softmax(0)
            context = (weights.unsqueeze(1) * memory).sum(0, keepdim=True)
            x = torch.cat([x, context], dim=1)
        for layer, cell in enumerate(cells):
            old = states[layer]
            new = cell(x, tuple(old) if shape.cell == "lstm" else old[0])
            states[layer] = list(new) if shape.cell == "lstm" else [new]
            x = states[layer][0]
        features = x if context is None else torch.cat([x, context, embedded], dim=1)
        logits.append(F.linear(features, decoder.head_weight, decoder.head_bias)[0])
    return torch.stack(logits)
