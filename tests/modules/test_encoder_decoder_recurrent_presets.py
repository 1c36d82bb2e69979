import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modules.encoder_decoder_recurrent import (
    INITIAL_BOUND,
    RecurrentNetwork,
    initial_value,
    role_of,
)
from modules.encoder_decoder_recurrent_presets import PRESETS, flops
from modules.presets import choose
from tests.modules.recurrent_networks import (
    SHAPES,
    SOURCE_VOCAB,
    TARGET_LENGTH,
    make_network,
    tokens,
)


@pytest.mark.parametrize("name", SHAPES)
def test_initial_values_depend_on_seed_and_name_alone(name):
    network = make_network(name, stirred=False)
    on_meta = make_network(name, stirred=False, device="meta")
    assert all(parameter.is_meta for parameter in on_meta.parameters())
    assert not list(on_meta.buffers())
    sizes = {name: parameter.shape for name, parameter in on_meta.named_parameters()}
    for key, parameter in reversed(list(network.named_parameters())):
        value = initial_value(network.shape, key, sizes[key], 1)
        assert torch.equal(value, parameter)
        if "bias" in key:
            assert not value.any()
        else:
            assert INITIAL_BOUND / 2 < value.abs().max() <= INITIAL_BOUND
            assert not torch.equal(value, initial_value(network.shape, key, sizes[key], 2))


@pytest.mark.parametrize(
    ("preset", "expected", "tolerance"),
    [("gru_attention", 20_518_405, 0), ("lstm_small", 13_898_501, 2048)],
)
def test_presets_have_the_parameters_of_the_tutorials(preset, expected, tolerance):
    with torch.device("meta"):
        network = RecurrentNetwork(
            choose(PRESETS, preset, {}), source_vocab=7853, target_vocab=5893,
            source_length=100, target_length=100,
        )  # fmt: skip
    count = sum(parameter.numel() for parameter in network.parameters())
    assert abs(count - expected) <= tolerance


@pytest.mark.parametrize("name", SHAPES)
def test_flops_are_those_of_the_products(name):
    # Wide enough that biases, which are counted as the weights are, do not matter.
    wide = dict(embedding_width=96, encoder_width=64, hidden_width=128)
    network = make_network(name, **wide)
    source, mask = tokens(1, 9, vocab=SOURCE_VOCAB), torch.ones(1, 9, dtype=torch.bool)
    inputs = tokens(1, TARGET_LENGTH)
    # The encoder is one operation that the counter does not know: it is put in by hand.
    parameters = {name: parameter.shape for name, parameter in network.named_parameters()}
    cells = [size.numel() for name, size in parameters.items() if "encoder.weight" in name]
    with FlopCounterMode(display=False) as counter:
        memory, state = network.encoder(source, mask)
        known = counter.get_total_flops()
        network.decoder(memory, mask, state, inputs, None, None, 0.0, None)
        decoder = counter.get_total_flops() - known
    bridges = [size.numel() for name, size in parameters.items() if "bridge_weight" in name]
    forward = 2 * 9 * sum(cells) + 2 * sum(bridges) + decoder
    assert flops(network.shape, parameters, 9, TARGET_LENGTH) == pytest.approx(
        3 * forward, rel=0.03
    )


def test_roles_are_those_of_the_parameters():
    network = make_network("gru")
    roles: dict[str, list[str]] = {}
    for name, parameter in network.named_parameters():
        roles.setdefault(role_of(network.shape, name, parameter.ndim), []).append(name)
    assert roles["embedding"] == ["encoder.embedding", "decoder.embedding"]
    assert roles["head"] == ["decoder.head_weight"]
    assert "decoder.weight_hh_l0" in roles["matrix"]
    assert all("bias" in name or "score" in name for name in roles["other"])


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("gru", {}, "module.preset=gru -> unknown"),
        ("lstm_small", {"cell": "rnn"}, "module.network.cell=rnn"),
        ("lstm_small", {"attention": "dot"}, "module.network.attention=dot"),
        ("lstm_small", {"width": 3}, "module.network.width"),
    ],
)
def test_unknown_settings_are_refused(preset, overrides, message):
    with pytest.raises(ValueError, match=message):
        choose(PRESETS, preset, overrides)
