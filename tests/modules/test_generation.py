import re
from typing import Any

import pytest
import torch

from modules.generation import filter_logits, generate, sample
from modules.gpt_networks import GPTNetwork
from modules.gpt_presets import shape_from

GREEDY: dict[str, Any] = dict(
    temperature=0.0, top_k=0, top_p=1.0, num_sequences=1, stop_token=None, seed=0
)
DRAWN = GREEDY | {"temperature": 1.0}
LENGTH = 16


def make_network(preset="modern_tiny"):
    shape = shape_from(preset, dict(num_layers=2, num_heads=4, num_kv_heads=4, width=32))
    network = GPTNetwork(shape, vocab_size=20, sequence_length=LENGTH)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return network.eval()


def run(network, prompt, **settings: Any):
    return generate(network, prompt, device=torch.device("cpu"), **(GREEDY | settings))


@pytest.mark.parametrize("preset", ["gpt2_tiny", "llama_tiny", "modern_tiny"])
def test_cached_logits_equal_uncached(preset):
    network = make_network(preset)
    tokens = torch.randint(20, (3, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full = network(tokens)
        cache = network.new_cache(3, torch.device("cpu"))
        stepwise = [network(tokens[:, :4], cache=cache)]
        stepwise += [network(tokens[:, i : i + 1], cache=cache) for i in range(4, 10)]
    torch.testing.assert_close(torch.cat(stepwise, 1), full[:, 3:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", ["gpt2_tiny", "modern_tiny"])
def test_greedy_generation_equals_a_loop_without_cache(preset):
    network = make_network(preset)
    ours = run(network, [1, 2, 3], max_new_tokens=30)[0]
    window, expected = [1, 2, 3], []
    for _ in range(30):
        if len(window) > LENGTH:
            window = window[-LENGTH // 2 :]
        logits = network(torch.tensor([window]))[0, -1]
        expected.append(int(logits.argmax()))
        window.append(expected[-1])
    assert ours == expected
    assert len(set(ours)) > 1


def test_sequences_differ_and_repeat_with_the_seed():
    network = make_network()
    settings = DRAWN | {"num_sequences": 3, "max_new_tokens": 12}
    first = run(network, [1], **settings)
    assert first == run(network, [1], **settings)
    assert first != run(network, [1], **settings | {"seed": 1})
    assert first[0] != first[1] != first[2]


def test_stop_token_ends_each_sequence_before_it():
    network = make_network()
    settings = DRAWN | {"num_sequences": 4, "max_new_tokens": 40}
    free = run(network, [1], **settings)
    stop = free[0][5]
    stopped = run(network, [1], **settings | {"stop_token": stop})
    for sequence, whole in zip(stopped, free, strict=True):
        end = whole.index(stop) if stop in whole else len(whole)
        assert sequence == whole[:end]


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (5, 1.0), (0, 0.5), (0, 0.95), (7, 0.8), (99, 0.01)]
)
def test_filters_equal_transformers_warpers(top_k, top_p):
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0)) * 3
    ids = torch.zeros(8, 1, dtype=torch.long)
    expected = logits
    if top_k:
        expected = TopKLogitsWarper(top_k)(ids, expected)  # pyright: ignore[reportArgumentType]
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(ids, expected)  # pyright: ignore[reportArgumentType]
    assert torch.equal(filter_logits(logits, top_k=top_k, top_p=top_p), expected)


def test_temperature_divides_the_logits():
    logits = torch.tensor([[0.0, 1.0]]).expand(20_000, 2)
    generator = torch.Generator().manual_seed(0)
    drawn = sample(logits, temperature=0.5, top_k=0, top_p=1.0, generator=generator)
    expected = torch.tensor([0.0, 1 / 0.5]).softmax(0)[1]
    assert drawn.float().mean().item() == pytest.approx(expected.item(), abs=0.01)


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([], {}, "no tokens to continue"),
        ([1], {"temperature": -1.0}, "temperature=-1.0"),
        ([1], {"top_k": -2}, "top_k=-2"),
        ([1], {"top_p": 0.0}, "top_p=0.0"),
        ([1], {"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_settings_out_of_range_are_refused(prompt, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(make_network(), prompt, max_new_tokens=1, **settings)
