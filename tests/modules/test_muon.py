import copy
from collections import defaultdict

import pytest
import torch
from torch import nn

from modules.muon import MuonAdamW
from modules.newton_schulz import orthogonalise

RATES = dict(matrix=1e-2, embedding=0.3, head=0.004, other=0.02)


def build(roles):
    return MuonAdamW(roles, lr=RATES, momentum=0.95, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)


def test_muon_equals_separate_torch_optimizers(make_roles, take_steps):
    ours, reference = make_roles(), make_roles()
    rates = {role: rate for role, rate in RATES.items() if role != "matrix"}
    separate = [
        torch.optim.Muon(reference["matrix"], lr=1e-2, weight_decay=0.1, momentum=0.95),
        torch.optim.AdamW(
            [{"params": reference[role], "lr": lr} for role, lr in rates.items()],
            betas=(0.9, 0.95),
            weight_decay=0.0,
        ),
    ]
    start = [p.detach().clone() for p in ours["matrix"]]
    take_steps(ours, [build(ours)])
    take_steps(reference, separate)
    for role in rates:
        torch.testing.assert_close(ours[role], reference[role], rtol=1e-6, atol=1e-6)
    # Newton-Schulz runs in bf16 in both, and a batch rounds otherwise than one matrix: compared by
    # how far the matrices moved.
    for a, b, before in zip(ours["matrix"], reference["matrix"], start, strict=True):
        assert (a - b).norm() < 0.02 * (b - before).norm()


def test_muon_batch_rounds_as_bf16_does():
    matrices = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalise(matrices).float())
    assert singular.min() > 0.5
    assert singular.max() < 1.3
    together, tall = orthogonalise(matrices), orthogonalise(matrices.mT).mT
    torch.testing.assert_close(together, tall, rtol=0.05, atol=0.02)


def test_muon_refuses_flattened_matrices(make_roles):
    roles = make_roles()
    with pytest.raises(ValueError, match=r"module\.optimizer\.name=muon.*shape \(4,\)"):
        build(roles | {"matrix": [nn.Parameter(torch.ones(4))]})
    optimizer = build(roles)
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.ones(4))]  # as a ZeRO engine does
    with pytest.raises(ValueError, match="flattens"):
        optimizer.step()


def test_muon_gives_the_same_in_small_batches(make_roles, flat, take_steps, monkeypatch):
    together, apart = make_roles(), make_roles()
    take_steps(together, [build(together)])
    monkeypatch.setattr("modules.newton_schulz.LARGEST_BATCH", 100)
    take_steps(apart, [build(apart)])
    for a, b in zip(flat(together), flat(apart), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_muon_steps_through_a_shallow_copy(make_roles, flat, take_steps):
    roles, copied = make_roles(), make_roles()
    optimizer = copy.copy(build(copied))
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    optimizer.state = defaultdict(dict)
    take_steps(roles, [build(roles)])
    take_steps(copied, [optimizer])
    for a, b in zip(flat(roles), flat(copied), strict=True):
        assert torch.equal(a, b)
