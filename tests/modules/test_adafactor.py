import pytest
import torch
import transformers
from torch import nn

import modules.adafactor
from modules.adafactor import Adafactor

SETTINGS = dict(lr=0.02, decay_exponent=0.8, clip_rms=1.0, eps=1e-30, min_rms=1e-3)


def build(parameters, *, weight_decay=0.0, **overrides):
    settings = {"scale_by_rms": True, **SETTINGS, **overrides}
    return Adafactor([{"params": parameters, "weight_decay": weight_decay}], **settings)


def small_and_zero(parameters):
    with torch.no_grad():
        parameters[0].mul_(0.05)
        parameters[1].zero_()  # whose scale is the smallest
    return parameters


@pytest.mark.parametrize("scale_by_rms", [True, False])
@pytest.mark.parametrize("clip_rms", [1.0, 0.3])
def test_adafactor_equals_that_of_transformers(
    make_roles, flat, take_steps, scale_by_rms, clip_rms
):
    ours, theirs = (small_and_zero(flat(make_roles())) for _ in range(2))
    optimizer = build(ours, scale_by_rms=scale_by_rms, clip_rms=clip_rms)
    reference = transformers.Adafactor(
        theirs,
        lr=0.02,
        clip_threshold=clip_rms,
        scale_parameter=scale_by_rms,
        relative_step=False,
    )
    for step in range(6):
        take_steps({"all": ours}, [optimizer], num_steps=1, start=step)
        take_steps({"all": theirs}, [reference], num_steps=1, start=step)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("weight_decay", "is_equal"), [(0.5, True), (0.0, False)])
def test_adafactor_decays_as_that_of_torch(make_roles, flat, take_steps, weight_decay, is_equal):
    ours, theirs = (small_and_zero(flat(make_roles())) for _ in range(2))
    take_steps({"all": ours}, [build(ours, weight_decay=weight_decay)])
    take_steps({"all": theirs}, [torch.optim.Adafactor(theirs, lr=0.02, weight_decay=0.5)])
    pairs = zip(ours, theirs, strict=True)
    assert is_equal == all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs)


def test_adafactor_remembers_rows_and_columns_of_matrices(take_steps):
    parameters = [nn.Parameter(torch.ones(shape)) for shape in ((6, 9), (5,), (2, 3, 4))]
    optimizer = build(parameters)
    take_steps({"all": parameters}, [optimizer])
    sizes = [{k: tuple(v.shape) for k, v in optimizer.state[p].items()} for p in parameters]
    assert sizes == [
        {"step": (), "exp_avg_sq_row": (6,), "exp_avg_sq_column": (9,)},
        {"step": (), "exp_avg_sq": (5,)},
        {"step": (), "exp_avg_sq": (2, 3, 4)},
    ]


def test_adafactor_gives_the_same_in_small_batches(make_roles, flat, take_steps, monkeypatch):
    together, apart = flat(make_roles()), flat(make_roles())
    take_steps({"all": together}, [build(together)])
    monkeypatch.setattr(modules.adafactor, "LARGEST_BATCH", 100)
    take_steps({"all": apart}, [build(apart)])
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


def test_adafactor_refuses_a_flattened_matrix(take_steps):
    parameters = [nn.Parameter(torch.ones(6, 9))]
    optimizer = build(parameters)
    flattened = [nn.Parameter(torch.ones(54))]
    optimizer.param_groups[0]["params"] = flattened  # as a ZeRO engine does
    with pytest.raises(ValueError, match=r"module\.optimizer\.name=adafactor.*flattens"):
        take_steps({"all": flattened}, [optimizer], num_steps=1)
