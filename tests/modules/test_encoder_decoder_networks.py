import pytest
import torch
import torch.nn.functional as F

from datamodules.batch import IGNORED
from modules.encoder_decoder_networks import TransformerNetwork, initial_value
from modules.encoder_decoder_presets import PRESETS
from modules.presets import choose
from tests.modules.small_transformers import FORMS, VOCAB_SIZE, make_network, pad, pair


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("form", FORMS)
def test_loss_is_summed_cross_entropy_of_the_logits(form, label_smoothing):
    network = make_network(form)
    *given, targets = pair()
    loss = network(*given, targets, label_smoothing=label_smoothing)
    reference = F.cross_entropy(
        network(*given).flatten(0, 1),
        targets.flatten(),
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference)


@pytest.mark.parametrize("form", FORMS)
def test_cached_logits_equal_uncached(form):
    network = make_network(form)
    source, mask, inputs, _ = pair()
    cache = network.new_cache(3, torch.device("cpu"))
    with torch.no_grad():
        whole = network(source, mask, inputs)
        # The first call may bring several tokens.
        steps = [network(source, mask, inputs[:, :3], cache=cache)]
        steps += [network(None, None, inputs[:, t : t + 1], cache=cache) for t in range(3, 12)]
    assert cache.length == 12
    torch.testing.assert_close(torch.cat(steps, 1), whole[:, 2:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [[2, 0, 0, 1], [1, 2], [0, 1, 2], [0, 0, 0]])
def test_selected_rows_of_a_cache_go_on_as_their_own(rows):
    network = make_network("t5_v1_1_base")
    source, mask, inputs, _ = pair()
    cache = network.new_cache(3, torch.device("cpu"))
    kept = torch.tensor(rows)
    with torch.no_grad():
        network(source, mask, inputs[:, :5], cache=cache)
        cache.select(kept)
        later = network(None, None, inputs[kept, 5:6], cache=cache)
        cache.select(torch.arange(len(rows)).flip(0))
        last = network(None, None, inputs[kept, 6:7].flip(0), cache=cache)
        whole = network(source, mask, inputs)[kept]
    torch.testing.assert_close(later[:, 0], whole[:, 5], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last[:, 0].flip(0), whole[:, 6], rtol=1e-5, atol=1e-5)


def test_beams_of_a_source_share_its_memory_when_reordered():
    network = make_network("base")
    source, mask, inputs, _ = pair()
    cache = network.new_cache(3, torch.device("cpu"))
    with torch.no_grad():
        network(source, mask, inputs[:, :1], cache=cache)
    cache.select(torch.tensor([0, 0, 1, 1, 2, 2]))
    memory = cache.memory
    cache.select(torch.tensor([1, 0, 2, 2, 4, 5]))  # among beams of the same source
    assert cache.memory is memory
    cache.select(torch.tensor([2, 3, 0, 1, 4, 5]))
    assert cache.memory is not memory


@pytest.mark.parametrize("form", FORMS)
def test_no_target_position_sees_a_later_one(form):
    network = make_network(form)
    source, mask, inputs, _ = pair()
    changed = inputs.clone()
    changed[:, 6] = (changed[:, 6] + 1) % VOCAB_SIZE
    with torch.no_grad():
        before, after = network(source, mask, inputs), network(source, mask, changed)
    torch.testing.assert_close(after[:, :6], before[:, :6], rtol=0, atol=1e-6)
    difference = (after - before)[:, 6:].abs().amax(-1)
    assert (difference > 1e-4).all()  # and every position from there on does see it


@pytest.mark.parametrize("form", FORMS)
def test_source_is_seen_whole_and_its_padding_never(form):
    network = make_network(form)
    source, mask, inputs, _ = pair()
    padding, last = source.clone(), source.clone()
    padding[~mask] = 7
    last[:, 6] = (last[:, 6] + 1) % VOCAB_SIZE
    with torch.no_grad():
        before = network(source, mask, inputs)
        torch.testing.assert_close(network(padding, mask, inputs), before, rtol=0, atol=1e-6)
        assert ((network(last, mask, inputs) - before).abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("form", FORMS)
def test_more_padding_changes_nothing(form):
    network = make_network(form)
    source, mask, inputs, targets = pair()
    wide = (pad(source, 5, 0), pad(mask, 5, False), pad(inputs, 3, 0), pad(targets, 3, IGNORED))
    with torch.no_grad():
        torch.testing.assert_close(
            network(*wide[:3])[:, :12], network(source, mask, inputs), rtol=0, atol=1e-6
        )
        loss, padded = (float(network(*x)) for x in ((source, mask, inputs, targets), wide))
        seen = float(network(pad(source, 5, 0), pad(mask, 5, True), inputs, targets))
    assert padded == pytest.approx(loss, rel=1e-6)
    assert seen != pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_row_without_source_gives_numbers_whatever_its_padding(form):
    network = make_network(form)
    source, mask, inputs, targets = pair()
    mask[1], targets[1], source[1] = False, IGNORED, 0
    loss = network(source, mask, inputs, targets)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())
    with torch.no_grad():
        logits = network(source, mask, inputs)
        padded = network(pad(source, 5, 0), pad(mask, 5, False), inputs)
        others = network(source[::2], mask[::2], inputs[::2], targets[::2])
    assert logits.isfinite().all()
    torch.testing.assert_close(padded, logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(loss.detach(), others)


@pytest.mark.parametrize("form", FORMS)
def test_order_of_tokens_matters_on_both_sides(form):
    network = make_network(form, encoder_layers=1, decoder_layers=1)
    source, mask, inputs, _ = pair()
    swapped, turned = source.clone(), inputs.clone()
    swapped[:, [1, 4]], turned[:, [1, 4]] = source[:, [4, 1]], inputs[:, [4, 1]]
    with torch.no_grad():
        before = network(source, mask, inputs)[:, -1]
        assert (network(swapped, mask, inputs)[:, -1] - before).abs().max() > 1e-4
        assert (network(source, mask, turned)[:, -1] - before).abs().max() > 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_gets_a_gradient(form):
    network = make_network(form)
    network(*pair()).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        if not name.endswith("key.bias"):  # which moves all scores of a query alike
            assert parameter.grad.any(), name


def test_dropout_acts_in_training_only():
    network = make_network("t5_v1_1_base", dropout=0.5)
    given = pair()[:3]
    assert torch.equal(network(*given), network(*given))
    network.train()
    assert not torch.equal(network(*given), network(*given))


@pytest.mark.parametrize("form", FORMS)
def test_bf16_is_near_fp32_with_and_without_cache(form):
    network = make_network(form)
    source, mask, inputs, targets = pair()
    with torch.no_grad():
        reference, loss = network(source, mask, inputs), network(source, mask, inputs, targets)
        with torch.autocast("cpu", torch.bfloat16):
            cache = network.new_cache(3, torch.device("cpu"))
            low = network(source, mask, inputs)
            network(source, mask, inputs[:, :-1], cache=cache)
            last = network(None, None, inputs[:, -1:], cache=cache)
            torch.testing.assert_close(
                network(source, mask, inputs, targets), loss, rtol=2e-2, atol=0
            )
    assert low.dtype == torch.float32
    scale = float(reference.std())
    assert (low - reference).abs().max() < 0.1 * scale
    assert (last[:, 0] - reference[:, -1]).abs().max() < 0.1 * scale


def test_initial_values_depend_on_seed_and_name_alone():
    networks = []
    for depth in (2, 3):
        shape = choose(PRESETS, "tiny", {"encoder_layers": depth, "decoder_layers": depth})
        lengths = {"source_length": 8, "target_length": 8}
        network = TransformerNetwork(shape, source_vocab=20, target_vocab=20, **lengths)
        torch.rand(7)  # the global generator has no part in it
        network.initialise(seed=1)
        networks.append(network.state_dict())
    for name, value in networks[0].items():
        assert torch.equal(value, networks[1][name]), name
    embedding = networks[0]["embedding.weight"]
    assert not torch.equal(embedding, initial_value(shape, "embedding.weight", embedding.shape, 2))
