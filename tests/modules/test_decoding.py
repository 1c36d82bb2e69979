import json
import re
from typing import Any

import pytest
import torch

from benchmarks.cells import start_ranks
from modules.decoding import decode
from tests.modules.decoding_ranks import LENGTHS

VOCAB_SIZE, LENGTH = 12, 14
PAD, STOP, START = 0, 1, 2
GREEDY: dict[str, Any] = dict(
    start_token=START, stop_token=STOP, max_new_tokens=LENGTH, num_beams=1, length_penalty=1.0,
    temperature=0.0, top_k=0, top_p=1.0, seed=0,
)  # fmt: skip


class Rerun:
    """Keeps the tokens that a decoder without a cache has to see again."""

    length = 0

    def __init__(self, batch):
        self.rows = torch.arange(batch)  # of the sources
        self.tokens = torch.empty(batch, 0, dtype=torch.long)

    def select(self, rows):
        self.rows = self.rows[rows]
        self.tokens = self.tokens[rows]


class T5:
    """A random T5 of transformers as a network of the contract."""

    target_length = LENGTH

    def __init__(self, seed):
        from transformers import T5Config, T5ForConditionalGeneration

        settings: dict[str, Any] = dict(
            vocab_size=VOCAB_SIZE, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
            dropout_rate=0.0, pad_token_id=PAD, eos_token_id=STOP, decoder_start_token_id=START,
            tie_word_embeddings=False,
        )  # fmt: skip
        self.model: Any = T5ForConditionalGeneration(T5Config(**settings)).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
        self.num_calls = 0

    def new_cache(self, batch, device):
        return Rerun(batch)

    def __call__(self, source, source_mask, inputs, *, cache):
        assert (source is None) == (cache.length > 0)
        if source is not None:
            self.source, self.mask = source, source_mask.long()
        self.num_calls += 1
        cache.tokens = torch.cat([cache.tokens, inputs], dim=1)
        cache.length += 1
        logits = self.model(
            input_ids=self.source[cache.rows],
            attention_mask=self.mask[cache.rows],
            decoder_input_ids=cache.tokens,
        ).logits
        return logits[:, -1:]

    def generate(self, source, mask, **settings):
        """What transformers finds, without start, stop and padding."""
        rows = self.model.generate(
            input_ids=source, attention_mask=mask.long(), do_sample=False,
            early_stopping=False, max_new_tokens=LENGTH, **settings,
        )  # fmt: skip
        return [until_stop(row[1:]) for row in rows.tolist()]


def until_stop(tokens):
    return tokens[: tokens.index(STOP)] if STOP in tokens else tokens


def sources(seed=0, lengths=(7, 3, 5, 1)):
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(3, VOCAB_SIZE, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    return source.where(mask, PAD), mask


def run(network, source, mask, **settings: Any):
    return decode(network, source, mask, **(GREEDY | settings))


@pytest.mark.parametrize("num_beams", [1, 2, 4])
def test_targets_equal_those_of_transformers(num_beams):
    penalties = (1.0,) if num_beams == 1 else (-1.0, 0.0, 0.6, 1.0, 2.0)
    lengths, best = set(), set()
    for seed in (0, 1, 4, 6):  # in 4 and 6 a search goes on beside one that is done
        network, (source, mask) = T5(seed), sources(seed)
        for penalty in penalties:
            settings = dict(num_beams=num_beams, length_penalty=penalty)
            ours = run(network, source, mask, **settings)
            assert ours == network.generate(source, mask, **settings), (seed, penalty)
            lengths |= {len(target) for target in ours}
            best.add((seed, str(ours)))
    assert LENGTH in lengths
    assert min(lengths) < LENGTH // 2  # some end early, some at the bound
    if num_beams > 1:
        assert len(best) > 4  # the penalty makes a difference


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(num_beams=3, length_penalty=2.0),
        dict(temperature=1.0, top_k=8, top_p=0.95, seed=5),
    ],
)
def test_targets_do_not_depend_on_the_batch(settings):
    network, (source, mask) = T5(14), sources(14)
    together = run(network, source, mask, **settings)
    alone = []
    for n, size in enumerate(mask.sum(1).tolist()):
        row, seed = (slice(n, n + 1), slice(size)), settings.get("seed", 0) + n
        alone += run(network, source[row], mask[row], **settings | {"seed": seed})
    assert together == alone
    assert len(set(map(str, together))) > 1


def test_draws_repeat_with_the_seed_and_follow_the_probabilities():
    network, (source, mask) = T5(2), sources(2, lengths=(4,))
    source, mask = source.expand(4000, -1), mask.expand(4000, -1)
    settings = dict(temperature=0.7, max_new_tokens=1)
    drawn = run(network, source, mask, **settings)
    assert drawn == run(network, source, mask, **settings)
    assert drawn != run(network, source, mask, **settings, seed=10_000)
    cache = network.new_cache(1, torch.device("cpu"))
    with torch.no_grad():
        logits = network(source[:1], mask[:1], torch.tensor([[START]]), cache=cache)[0, 0]
    expected = (logits / 0.7).softmax(0)
    counts = torch.bincount(
        torch.tensor([tokens[0] if tokens else STOP for tokens in drawn]), minlength=VOCAB_SIZE
    )
    torch.testing.assert_close(counts / 4000, expected, rtol=0, atol=0.03)


def test_one_likely_token_makes_draws_greedy():
    network, (source, mask) = T5(3), sources(3)
    greedy = run(network, source, mask)
    assert run(network, source, mask, temperature=1.0, top_k=1) == greedy
    assert run(network, source, mask, temperature=1.0) != greedy


class Garden:
    """Its likeliest first token leads to ten unlikely ones; the other one to a sure end."""

    target_length = LENGTH
    FIRST, SECOND = 2, 3

    def new_cache(self, batch, device):
        return Rerun(batch)

    def __call__(self, source, source_mask, inputs, *, cache):
        cache.tokens = torch.cat([cache.tokens, inputs], dim=1)
        return self.probabilities(cache.tokens).log().unsqueeze(1)

    def probabilities(self, tokens):
        """[R, V] after tokens [R, T]."""
        rows = torch.full((len(tokens), VOCAB_SIZE), 1e-9)
        if tokens.size(1) == 1:
            rows[:, self.FIRST], rows[:, self.SECOND] = 0.6, 0.4
        else:
            rows[:, STOP] = 0.98
            rows[tokens[:, 1] == self.FIRST] = 1 / VOCAB_SIZE
        return rows / rows.sum(1, keepdim=True)

    def score(self, target):
        """Log probability of a target with its stop token."""
        total = 0.0
        tokens = [START, *target, STOP]
        for length in range(1, len(tokens)):
            row = self.probabilities(torch.tensor([tokens[:length]]))[0]
            total += float(row[tokens[length]].log())
        return total


def test_beams_find_a_likelier_target_than_greedy():
    network, (source, mask) = Garden(), sources(lengths=(2,))
    greedy = run(network, source, mask)[0]
    beam = run(network, source, mask, num_beams=2, length_penalty=0.0)[0]
    assert greedy[0] == Garden.FIRST
    assert beam == [Garden.SECOND]
    assert network.score(beam) > network.score(greedy) + 1


def test_search_stops_when_all_targets_have_ended():
    network, (source, mask) = T5(0), sources(0)
    for length in range(1, LENGTH + 1):  # and never goes beyond the bound
        network.num_calls = 0
        targets = run(network, source, mask, max_new_tokens=length)
        longest = max(map(len, targets))
        assert network.num_calls == min(longest + 1, length)


def test_ranks_call_the_network_equally_often(tmp_path):
    start_ranks("tests.modules.decoding_ranks", [str(tmp_path)], 2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    longest = max(map(max, LENGTHS)) + 1  # with the stop token
    assert first["greedy"] == second["greedy"] == longest
    assert first["bound"] == second["bound"] == 6
    assert first["beams"] == second["beams"] >= longest
    # Without the others a rank stops when its own targets have ended.
    assert (first["alone"], second["alone"]) == tuple(max(own) + 1 for own in LENGTHS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 0}, "num_beams=0"),
        ({"num_beams": 2, "temperature": 1.0}, "temperature=1.0 -> num_beams=2"),
        ({"num_beams": 2, "length_penalty": float("nan")}, "length_penalty=nan"),
        ({"max_new_tokens": LENGTH + 1}, f"1 to {LENGTH} tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_k": -2}, "top_k=-2"),
        ({"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(Garden(), *sources(), **settings)
