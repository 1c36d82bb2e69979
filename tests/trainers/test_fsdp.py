"""FSDP2 shards on two gloo ranks against plain torch on one; one start of the ranks for all."""

import warnings

import pytest
import torch

from benchmarks.cells import start_ranks
from tests.trainers.fsdp_modules import (
    RANKS,
    STEPS,
    Adversaries,
    Network,
    OnePart,
    TinyGPT,
    batches,
    draw,
    fit,
    follow,
    token_batches,
    weights,
)
from tests.trainers.fsdp_ranks import ADAMW, ONE_PART, PRESETS, SavesHalfWay
from trainers.checkpoint import load_weights
from trainers.strategies.replicated import Single

pytestmark = pytest.mark.slow  # half a minute; what users see is in the parity tests, every day


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Where the ranks, started once, have left what they found."""
    out = tmp_path_factory.mktemp("ranks")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(OnePart(**ADAMW), Single, callbacks=[SavesHalfWay(out / "single")])
    start_ranks("tests.trainers.fsdp_ranks", [str(out)], RANKS)
    return out


def found(out, case, rank=0):
    result = torch.load(out / f"{case}-{rank}.pt", weights_only=False)
    assert not isinstance(result, str), result
    return result


def distance(one, other):
    """Largest difference; of buffers too."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def reference(make=torch.optim.SGD, clip=None, accum=1, **options):
    """Plain torch on all rows."""
    network = Network()
    for name, parameter in network.named_parameters():
        parameter.data = draw(f"network.{name}", parameter.shape)
    optimizer = make(network.parameters(), **(options or {"lr": 0.02, "momentum": 0.9}))
    norm = torch.zeros(())
    for x, y in batches():
        optimizer.zero_grad()
        (network(x) - y).square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), clip or float("inf"))
        optimizer.step()
    state = {f"network.{name}": p.detach() for name, p in network.named_parameters()}
    return state | {"steps": torch.tensor([float(STEPS * accum)])}, norm


@pytest.mark.parametrize("case", ONE_PART)
def test_two_ranks_train_as_plain_torch(out, case):
    built, options = ONE_PART[case]
    clip, accum = options.get("gradient_clip"), options.get("accum", 1)
    expected, norm = reference(**built, clip=clip, accum=accum)
    state, found_norm = found(out, "one_part")[case]
    assert distance(state, expected) < 1e-6
    assert float(found_norm) == pytest.approx(float(norm), rel=1e-5)  # of the whole gradient
    start = {name: draw(name, value.shape) for name, value in state.items()}
    assert distance(state, start) > 1e-2
    assert found(out, "one_part", rank=1)[case][0] == {}


def test_meta_parameters_start_whole_one_at_a_time(out):
    most_alive, held, state, *_ = found(out, "start")
    assert most_alive == 1
    numbers = sum(value.numel() for name, value in state.items() if name != "steps")
    assert held < 0.7 * numbers
    expected = {name: draw(name, value.shape) for name, value in state.items() if name != "steps"}
    assert distance(state, expected | {"steps": state["steps"]}) == 0


def test_ordinary_module_starts_as_rank_zero_has_it(out):
    *_, drawn, state = found(out, "start")
    assert distance(state, drawn | {"steps": state["steps"]}) == 0
    assert distance(drawn, found(out, "start", rank=1)[-2]) > 0.1  # or it would prove nothing


def train_adversaries():
    """Plain torch on all rows, of a round at once."""
    module = Adversaries()
    optimizers = module.configure_optimizers()
    for batch in batches():
        for (part, network), optimizer in zip(module.parts.items(), optimizers, strict=True):
            for other in module.parts.values():
                other.requires_grad_(other is network)
            module.losses(part, *batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        follow(module.average, dict(module.generator.named_parameters()))
    return module.state_dict()


@pytest.mark.parametrize("case", ["plain", "accumulated", "kept_back"])
def test_adversaries_and_average_are_exact(out, case):
    assert distance(found(out, "adversaries")[case][0], train_adversaries()) < 1e-6


def test_weights_gathered_over_a_step_are_noticed(out):
    assert distance(found(out, "adversaries")["control"][0], train_adversaries()) > 1e-4


def test_gradients_are_fp32_though_the_part_was_frozen_at_first(out):
    assert found(out, "adversaries")["bf16"][1] == {torch.float32}


def test_gradients_are_fp32_of_what_learns_later(out):
    assert found(out, "thawing") == [None] * 2 + [torch.float32] * (STEPS - 2)


@pytest.mark.filterwarnings("ignore:.*no `val_dataloader`")
@pytest.mark.parametrize("preset", PRESETS)
def test_bf16_is_no_further_from_fp32_than_that_of_one_rank(out, preset):
    exact, plain = (
        weights(fit(TinyGPT(preset), Single, data=token_batches(), precision=precision))
        for precision in ("fp32", "bf16")
    )
    sharded = found(out, "bf16")[preset]

    def error(state):
        return sum(float((state[name] - exact[name]).square().sum()) for name in exact) ** 0.5

    assert 0 < error(sharded) < 1.5 * error(plain)


def test_resumed_run_ends_with_the_same_bits(out):
    found(out, "checkpoint")
    assert same(load_weights(out / "whole"), load_weights(out / "resumed"))
    assert same(saved_state(out / "whole"), saved_state(out / "resumed"))


def saved_state(path):
    saved = torch.load(path / "state.pt", weights_only=True)
    return {key: saved[key] for key in ("optimizer_states", "global_step")}


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_checkpoint_is_that_of_one_rank(out):
    found(out, "checkpoint")
    one, other = (saved_state(out / name)["optimizer_states"][0] for name in ("single", "half"))
    assert one["param_groups"] == other["param_groups"]
    for name, values in one["state"].items():
        assert values.keys() == other["state"][name].keys()
        assert distance(values, other["state"][name]) < 1e-6
    assert distance(load_weights(out / "single"), load_weights(out / "half")) < 1e-6


@pytest.mark.filterwarnings("ignore:.*dataloader is not resumable")
def test_checkpoints_move_between_one_rank_and_shards(out, tmp_path):
    found(out, "checkpoint")
    fit(OnePart(**ADAMW), Single, resume=out / "half").save_checkpoint(tmp_path / "back")
    expected, _ = reference(**ADAMW)
    for path in (tmp_path / "back", out / "moved"):
        assert distance(load_weights(path), expected) < 1e-6


def test_overflow_on_one_rank_skips_the_step_on_all(out):
    for rank in range(RANKS):
        _, scale = found(out, "overflow", rank)
        assert scale["network"]["scale"] == 2.0**15
    state, _ = found(out, "overflow")
    expected = {name: draw(name, value.shape) for name, value in state.items() if name != "steps"}
    assert distance(state, expected | {"steps": state["steps"]}) == 0


def test_what_cannot_work_is_said(out):
    messages = found(out, "refusals")
    assert "initial_value('network.leave.bias') has the shape [7]" in messages["shape"]
    assert "on the meta device and it does not say" in messages["silent"]
    assert "`scale` is in no network" in messages["bare"]
    assert "network.added.weight is missing" in messages["weights"]


def test_sharded_module_is_trained_on_and_evaluated_by_other_trainers(out):
    state, value = found(out, "again")
    assert distance(state, reference(lr=0.02)[0]) < 1e-6
    network = Network()
    network.load_state_dict({n.removeprefix("network."): w for n, w in state.items() if "." in n})
    assert value == pytest.approx(network(batches(rank=0)[0][0]).sum().item(), rel=1e-5)
