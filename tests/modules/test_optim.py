import io
import math
import re
from typing import Any

import pytest
import torch

from modules.muon import MuonAdamW
from modules.optim import Schedule, build_optimizer, build_schedule, check_settings

SETTINGS: dict[str, Any] = dict(
    name="adamw",
    lr=1e-2,
    weight_decay=0.1,
    adamw=dict(betas=[0.9, 0.95], eps=1e-8),
    muon=dict(momentum=0.95, embedding_lr=0.3, head_lr=0.004, other_lr=0.02),
    sgd=dict(momentum=0.9),
    adamw_rms=dict(min_rms=1e-3),
    adafactor=dict(decay_exponent=0.8, clip_rms=1.0, eps=1e-30, scale_by_rms=True, min_rms=1e-3),
)
PLAN = dict(batch_samples=10, max_samples=1000, max_steps=100, tokens_per_sample=8)
SCHEDULE: dict[str, Any] = dict(
    name="cosine",
    warmup_samples=100,
    warmup_tokens=None,
    decay_samples=None,
    decay_tokens=None,
    final_lr_fraction=0.1,
)


def build(roles, **overrides: Any):
    return build_optimizer(roles, **(SETTINGS | overrides))


def test_fused_adamw_equals_plain_adamw_with_decay_on_matrices_only(make_roles, flat, take_steps):
    ours, reference = make_roles(), make_roles()
    decayed = [p for p in flat(reference) if p.ndim >= 2]
    plain = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": 0.1},
            {"params": reference["other"], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
        foreach=False,
    )
    take_steps(ours, [build(ours, **SETTINGS)])
    take_steps(reference, [plain])
    torch.testing.assert_close(flat(ours), flat(reference), rtol=1e-6, atol=1e-6)


def test_unknown_optimizer_is_refused(make_roles):
    with pytest.raises(ValueError, match=r"module\.optimizer\.name=adam .*adamw_rms or adafactor"):
        build(make_roles(), name="adam")


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"lr": "oops"}, "lr=oops"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"adamw": {"betas": 0.9, "eps": 1e-8}}, "adamw.betas=0.9"),
        ({"adamw": {"betas": [0.9, 1.5], "eps": 1e-8}}, "adamw.betas=[0.9, 1.5]"),
        ({"adamw": {"betas": [0.9, 0.95], "eps": None}}, "adamw.eps=None"),
    ],
)
def test_setting_that_is_no_number_is_named(wrong, named):
    assert check_settings(SETTINGS | {"gradient_clip": None}) == SETTINGS
    with pytest.raises(ValueError, match=re.escape(f"module.optimizer.{named} -> it is ")):
        check_settings(SETTINGS | wrong)


@pytest.mark.parametrize("key", ["warmup_samples", "final_lr_fraction"])
def test_schedule_of_no_number_is_named(key):
    with pytest.raises(ValueError, match=rf"module\.schedule\.{key}=soon -> it is a number"):
        Schedule(PLAN, **(SCHEDULE | {key: "soon"}))


def test_schedule_scales_every_group_alike(make_roles):
    optimizer = build(make_roles(), name="muon")
    assert isinstance(optimizer, MuonAdamW)
    scheduler = build_schedule(optimizer, Schedule(PLAN, **SCHEDULE), PLAN["batch_samples"])
    peaks = [1e-2, 0.3, 0.004, 0.02]
    for step in range(12):
        expected = Schedule(PLAN, **SCHEDULE).multiplier(10 * step)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([peak * expected for peak in peaks])
        optimizer.step()
        scheduler.step()
    assert scheduler.state_dict()["lr_lambdas"] == [None] * 4  # nothing to unpickle


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {0: 0.1, 50: 0.6, 90: 1.0, 100: 1.0, 550: 0.55, 1000: 0.1}),
        ({"name": "linear"}, {0: 0.1, 100: 1.0, 325: 0.775, 550: 0.55, 1000: 0.1}),
        ({"name": "constant", "final_lr_fraction": None}, {0: 0.1, 90: 1.0, 1000: 1.0}),
        (
            {"name": "wsd", "decay_samples": 400, "final_lr_fraction": 0.0},
            {0: 0.1, 90: 1.0, 600: 1.0, 800: 0.5, 1000: 0.0},
        ),
        ({"warmup_samples": None, "warmup_tokens": 1600}, {0: 0.05, 190: 1.0, 200: 1.0}),
        ({"warmup_samples": 0}, {0: 1.0, 250: 0.1 + 0.45 * (1 + math.cos(math.pi / 4))}),
        (
            {"name": "wsd", "warmup_samples": 0, "decay_tokens": 8000},
            {0: 1.0, 500: 0.55, 1000: 0.1},
        ),
        (
            {"name": "inverse_sqrt", "final_lr_fraction": None},
            {0: 0.1, 50: 0.6, 90: 1.0, 100: 1.0, 400: 0.5, 900: 1 / 3, 10000: 0.1},
        ),
    ],
)
def test_schedule_has_closed_form_values(settings, expected):
    schedule = Schedule(PLAN, **(SCHEDULE | settings))
    assert {p: schedule.multiplier(p) for p in expected} == pytest.approx(expected)


def test_schedule_is_a_function_of_samples_whatever_the_batch():
    small = Schedule(PLAN | {"batch_samples": 5}, **SCHEDULE)
    assert small.multiplier(500) == Schedule(PLAN, **SCHEDULE).multiplier(500)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "cosin"}, "module.schedule.name=cosin"),
        ({"warmup_tokens": 8}, "module.schedule.warmup_samples=100 warmup_tokens=8"),
        ({"warmup_samples": None}, "warmup_samples=None warmup_tokens=None"),
        ({"name": "wsd"}, "decay_samples=None decay_tokens=None"),
        ({"decay_tokens": 80}, "module.schedule.decay_tokens=80 -> it has no meaning"),
        ({"name": "constant"}, "module.schedule.final_lr_fraction=0.1 -> it has no meaning"),
        ({"final_lr_fraction": None}, "module.schedule.final_lr_fraction=null"),
        ({"name": "inverse_sqrt"}, "module.schedule.final_lr_fraction=0.1 -> it has no meaning"),
        (
            {"name": "inverse_sqrt", "warmup_samples": 0, "final_lr_fraction": None},
            "module.schedule: warm-up of 0 samples -> inverse_sqrt falls from",
        ),
        ({"warmup_samples": 1001}, "they do not fit a run of 1000 samples"),
        ({"name": "wsd", "decay_samples": 901}, "they do not fit a run of 1000 samples"),
    ],
)
def test_impossible_schedule_is_refused_by_its_key(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Schedule(PLAN, **(SCHEDULE | settings))


@pytest.mark.parametrize("name", ["adamw_rms", "adafactor"])
def test_decay_applies_to_two_or_more_dimensions(make_roles, flat, name):
    roles = make_roles()
    optimizer = build(roles, name=name)
    for group in optimizer.param_groups:
        assert group["weight_decay"] == (0.1 if group["params"][0].ndim >= 2 else 0.0)
    assert {p for g in optimizer.param_groups for p in g["params"]} == {*flat(roles)}


@pytest.mark.parametrize("name", ["muon", "adamw_rms", "adafactor"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_vetoed_steps_of_whole_tensors_leave_no_trace(make_roles, flat, take_steps, name, shape):
    straight, guarded = make_roles(), make_roles()
    reference, optimizer = build(straight, name=name), build(guarded, name=name)
    take_steps(straight, [reference], num_steps=4)

    def vetoed_step():
        for parameter in flat(guarded):
            parameter.grad = torch.full_like(parameter, float("nan"))
        optimizer.found_inf = torch.ones(shape)
        optimizer.step()

    vetoed_step()  # before there is state
    for step in range(4):
        optimizer.found_inf = torch.zeros(shape)
        take_steps(guarded, [optimizer], num_steps=1, start=step)
        vetoed_step()
    for a, b in zip(flat(straight), flat(guarded), strict=True):
        assert torch.equal(a, b)
        assert reference.state[a].keys() == optimizer.state[b].keys()
        for key, value in reference.state[a].items():
            assert torch.equal(value, optimizer.state[b][key]), key


@pytest.mark.parametrize("name", ["muon", "adamw_rms", "adafactor"])
def test_state_round_trips_through_a_safe_load(make_roles, flat, take_steps, name):
    straight, resumed = make_roles(), make_roles()
    take_steps(straight, [build(straight, name=name)], num_steps=6)

    first = build(resumed, name=name)
    take_steps(resumed, [first], num_steps=3)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = build(resumed, name=name)
    second.load_state_dict(torch.load(file, weights_only=True))
    take_steps(resumed, [second], num_steps=3, start=3)
    for a, b in zip(flat(straight), flat(resumed), strict=True):
        assert torch.equal(a, b)
