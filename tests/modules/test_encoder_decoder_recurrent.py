from typing import Any

import pytest
import torch
import torch.nn.functional as F

from datamodules.batch import IGNORED
from modules.decoding import decode
from tests.modules.recurrent_networks import (
    LENGTHS,
    SHAPES,
    SOURCE_VOCAB,
    TARGET_LENGTH,
    TARGET_VOCAB,
    close,
    make_batch,
    make_network,
    reference_logits,
    tokens,
)

CPU = torch.device("cpu")
ALL = [True] * TARGET_LENGTH
SOME = [False, True, False, False, True, False, False]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("is_fed", [ALL, SOME], ids=["all", "some"])
def test_logits_and_gradients_equal_torch_cells(name, is_fed):
    network = make_network(name)
    source, mask, inputs = make_batch()
    teacher = None if is_fed is ALL else torch.tensor(is_fed)
    logits = network(source, mask, inputs, teacher=teacher)
    is_fed = [True, *is_fed[1:]]  # the first step has no prediction before it
    expected = torch.stack(
        [
            reference_logits(network, row[:length], own, is_fed)
            for row, length, own in zip(source, LENGTHS, inputs, strict=True)
        ]
    )
    assert expected.std() > 0.5
    close(logits, expected)
    if is_fed is not ALL and teacher is not None:
        assert (logits - network(source, mask, inputs)).abs().max() > 0.1
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    parameters = dict(network.named_parameters())
    ours = torch.autograd.grad((logits * weights).sum(), list(parameters.values()))
    theirs = torch.autograd.grad((expected * weights).sum(), list(parameters.values()))
    for parameter, one, other in zip(parameters, ours, theirs, strict=True):
        assert other.abs().max() > 0, parameter
        close(one, other, 1e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_loss_is_cross_entropy_of_the_logits(name):
    network = make_network(name)
    source, mask, inputs = make_batch()
    targets = tokens(*inputs.shape, seed=5)
    targets[0, 3:] = targets[2, :] = IGNORED
    for smoothing in (0.0, 0.1):
        for teacher in (None, torch.tensor(SOME)):
            options: dict[str, Any] = dict(teacher=teacher)
            loss = network(source, mask, inputs, targets, label_smoothing=smoothing, **options)
            logits = network(source, mask, inputs, **options)
            expected = F.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum",
                label_smoothing=smoothing,
            )  # fmt: skip
            assert loss.dtype == torch.float32
            close(loss, expected)


@pytest.mark.parametrize("name", SHAPES)
def test_teacher_everywhere_equals_none_with_dropout_too(name):
    network = make_network(name, dropout=0.3).train()
    found = []
    for teacher in (None, torch.tensor(ALL), torch.tensor([False, *ALL[1:]])):
        torch.manual_seed(0)
        found.append(network(*make_batch(), teacher=teacher))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])  # the first step is fed its input in any case
    assert not torch.equal(found[0], network.eval()(*make_batch()))


def test_own_predictions_are_the_greedy_targets():
    network = make_network("gru")
    source, mask, inputs = make_batch()
    inputs[:, 0] = 2
    teacher = torch.zeros(TARGET_LENGTH, dtype=torch.bool)
    predicted = network(source, mask, inputs, teacher=teacher).argmax(-1)
    greedy = decode(
        network, source, mask, start_token=2, stop_token=-1, max_new_tokens=TARGET_LENGTH,
        num_beams=1, length_penalty=1.0, temperature=0.0, top_k=0, top_p=1.0, seed=0,
    )  # fmt: skip
    assert predicted.tolist() == greedy
    assert len(set(map(tuple, greedy))) > 1


@pytest.mark.parametrize("name", SHAPES)
def test_padding_changes_nothing(name):
    network = make_network(name)
    source, mask, inputs = make_batch()
    logits = network(source, mask, inputs)
    other = torch.where(mask, source, 3)
    close(network(other, mask, inputs), logits, 1e-6)
    longer = F.pad(source, (0, 4), value=7), F.pad(mask, (0, 4))
    close(network(*longer, inputs), logits, 1e-6)
    for row, length in enumerate(LENGTHS):
        one = slice(row, row + 1)
        alone = network(source[one, :length], mask[one, :length], inputs[one])
        close(alone, logits[one], 1e-5)
    # The control: a token that counts, the last one of a row, matters.
    changed = source.clone()
    changed[0, LENGTHS[0] - 1] += 1
    difference = (network(changed % SOURCE_VOCAB, mask, inputs) - logits).abs().amax((1, 2))
    assert difference[0] > 1e-3
    close(difference[1:], torch.zeros(2), 1e-6)


@pytest.mark.parametrize("name", ["gru", "deep_lstm_attention"])
def test_attention_ignores_padding_of_the_memory(name):
    decoder: Any = make_network(name).decoder
    source, mask, inputs = make_batch()
    memory, state = make_network(name).encoder(source, mask)
    logits = decoder(memory, mask, state, inputs, None, None, 0.0, None)
    stirred = memory + torch.randn(memory.shape, generator=torch.Generator().manual_seed(3))
    padded = torch.where(mask.unsqueeze(-1), memory, stirred)
    close(decoder(padded, mask, state, inputs, None, None, 0.0, None), logits, 1e-6)
    assert (decoder(stirred, mask, state, inputs, None, None, 0.0, None) - logits).abs().max() > 0.1


@pytest.mark.parametrize("name", SHAPES)
def test_row_that_is_all_padding_harms_nothing(name):
    network = make_network(name)
    source, mask, inputs = make_batch()
    logits = network(source, mask, inputs)
    mask[1] = False
    targets = tokens(*inputs.shape, seed=5)
    targets[1] = IGNORED
    close(network(source, mask, inputs)[[0, 2]], logits[[0, 2]])
    network(source, mask, inputs, targets).backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@pytest.mark.parametrize("name", SHAPES)
def test_no_target_sees_a_later_one(name):
    network = make_network(name)
    source, mask, inputs = make_batch()
    logits = network(source, mask, inputs)
    changed = inputs.clone()
    changed[:, 4] = (changed[:, 4] + 1) % TARGET_VOCAB
    other = network(source, mask, changed)
    assert torch.equal(other[:, :4], logits[:, :4])
    assert ((other - logits).abs().amax(-1)[:, 4:] > 1e-4).all()  # the control: later ones do


@pytest.mark.parametrize("name", SHAPES)
def test_cached_logits_equal_uncached(name):
    network = make_network(name)
    source, mask, inputs = make_batch()
    full = network(source, mask, inputs)
    cache = network.new_cache(3, CPU)
    steps = [network(source, mask, inputs[:, :2], cache=cache)]
    rows = torch.tensor([2, 0, 2, 1])
    cache.select(rows)
    for step in range(2, TARGET_LENGTH):
        assert cache.length == step
        steps.append(network(None, None, inputs[rows, step : step + 1], cache=cache))
    close(steps[0], full[:, 1:2])
    close(torch.cat(steps[1:], dim=1), full[rows, 2:])
    assert (full[0] - full[2]).abs().max() > 0.1


class Rerun:
    """A network without a cache: it sees all tokens anew at each call."""

    length = 0

    def __init__(self, network):
        self.network, self.target_length = network, network.target_length

    def new_cache(self, batch, device):
        self.tokens = torch.empty(batch, 0, dtype=torch.long)
        return self

    def select(self, rows):
        self.source, self.mask, self.tokens = (
            part[rows] for part in (self.source, self.mask, self.tokens)
        )

    def __call__(self, source, source_mask, inputs, *, cache):
        if source is not None:
            self.source, self.mask = source, source_mask
        self.tokens = torch.cat([self.tokens, inputs], dim=1)
        return self.network(self.source, self.mask, self.tokens)[:, -1:]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    "search", [dict(num_beams=1, temperature=0.0), dict(num_beams=3, temperature=0.0),
               dict(num_beams=1, temperature=1.0)], ids=["greedy", "beams", "drawn"],
)  # fmt: skip
def test_targets_equal_those_without_cache(name, search):
    network = make_network(name)
    source, mask, _ = make_batch()
    settings: dict[str, Any] = search | dict(
        start_token=2, stop_token=1, max_new_tokens=TARGET_LENGTH, length_penalty=1.0, top_k=0,
        top_p=1.0, seed=0,
    )  # fmt: skip
    targets = decode(network, source, mask, **settings)
    assert targets == decode(Rerun(network), source, mask, **settings)
    alone = []
    for row, length in enumerate(LENGTHS):
        part = slice(row, row + 1), slice(length)
        alone += decode(network, source[part], mask[part], **settings | {"seed": row})
    assert targets == alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["masters", "low"])
@pytest.mark.parametrize("name", SHAPES)
def test_autocast_stays_near_fp32(name, dtype):
    network = make_network(name, stirred=False)
    source, mask, inputs = make_batch()
    targets, teacher = tokens(*inputs.shape, seed=5), torch.tensor(SOME)
    expected = network(source, mask, inputs, targets)
    network = network.to(dtype)  # as strategies may keep or gather weights
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        loss = network(source, mask, inputs, targets)
        fed = network(source, mask, inputs, targets, teacher=teacher)
        cache = network.new_cache(3, CPU)
        with torch.no_grad():
            network(source, mask, inputs[:, :1], cache=cache)
            cached = network(None, None, inputs[:, 1:2], cache=cache)
    (loss + fed).backward()
    assert loss.dtype == cached.dtype == cache.state.dtype == torch.float32
    close(loss, expected, 0.01)
    assert all(parameter.grad.abs().max() > 0 for parameter in network.parameters())


@pytest.mark.parametrize("name", SHAPES)
def test_equally_long_sources_train_in_fp16(name):
    network = make_network(name, stirred=False)
    source, inputs, targets = (tokens(3, 5, vocab=9, seed=seed) for seed in range(3))
    mask = torch.ones_like(source, dtype=torch.bool)  # torch then asks oneDNN, which has no fp16
    expected = network(source, mask, inputs, targets)
    with torch.autocast("cpu", torch.float16):
        loss = network(source, mask, inputs, targets)
    loss.backward()
    close(loss, expected, 0.01)
