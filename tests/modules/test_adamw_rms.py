import pytest
import torch
from torch import nn

from modules.adamw_rms import AdamWRMS

SETTINGS = dict(lr=0.02, betas=(0.9, 0.95), eps=1e-6, min_rms=1e-3)


def build(parameters):
    return AdamWRMS([{"params": parameters, "weight_decay": 0.1}], **SETTINGS)


def step_by_hand(parameter, state, step, *, is_scaled=True):
    """One step in double precision, from the formulas."""
    gradient = parameter.grad.double()
    rms = parameter.double().square().mean().sqrt()
    scale = max(1e-3, rms.item()) if is_scaled else 1.0
    state["m"] = 0.9 * state["m"] + 0.1 * gradient
    state["v"] = 0.95 * state["v"] + 0.05 * gradient.square()
    mean, square = state["m"] / (1 - 0.9**step), state["v"] / (1 - 0.95**step)
    decayed = (1 - 0.02 * 0.1) * parameter.double()
    return (decayed - 0.02 * scale * mean / (square.sqrt() + 1e-6)).float()


@pytest.mark.parametrize(("is_scaled", "is_equal"), [(True, True), (False, False)])
def test_adamw_rms_equals_a_loop_by_hand(make_roles, flat, take_steps, is_scaled, is_equal):
    ours, theirs = flat(make_roles()), flat(make_roles())
    with torch.no_grad():
        for same in (ours, theirs):
            same[0].mul_(0.05)
            same[1].zero_()  # whose scale is the smallest
    optimizer = build(ours)
    states = [{"m": 0.0, "v": 0.0} for _ in theirs]
    for step in range(5):
        take_steps({"all": ours}, [optimizer], num_steps=1, start=step)
        take_steps({"all": theirs}, [], num_steps=1, start=step)
        for parameter, state in zip(theirs, states, strict=True):
            after = step_by_hand(parameter, state, step + 1, is_scaled=is_scaled)
            parameter.data.copy_(after)
    pairs = zip(ours, theirs, strict=True)
    assert is_equal == all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs)


def test_adamw_rms_is_adamw_where_the_rms_is_one(take_steps):
    signs = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).sign()
    ours, theirs = nn.Parameter(signs.clone()), nn.Parameter(signs.clone())
    optimizer = build([ours])
    plain = torch.optim.AdamW([theirs], lr=0.02, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)
    for step in range(4):
        take_steps({"all": [ours]}, [optimizer], num_steps=1, start=step)
        take_steps({"all": [theirs]}, [plain], num_steps=1, start=step)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        with torch.no_grad():  # back to one
            ours.div_(ours.square().mean().sqrt())
            theirs.div_(theirs.square().mean().sqrt())
