import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from modules.gan_losses import (
    LOSSES,
    NEEDS_REAL,
    check_loss,
    discriminator_loss,
    generator_loss,
    gradient_norm_penalty,
    interpolate,
    lazy_rates,
    squared_gradient,
)
from modules.gan_objective import Objective

REAL = [-3.0, -0.4, 0.0, 0.7, 1.6, 40.0]
FAKE = [2.0, 0.3, 0.0, -1.4, 0.9, -40.0]


def sigmoid(t):
    return 1 / (1 + math.exp(-t))


def hinge(t):
    return (max(0.0, 1 - t), -1.0 if t < 1 else 0.0)


# name -> of two logits: discriminator's loss, its derivatives by both, generator's, by both.
# Probabilities as they stand in the papers, so only for logits where they do not run over.
REFERENCES = {
    "saturating": lambda r, f: (
        -math.log(sigmoid(r)) - math.log(1 - sigmoid(f)),
        (sigmoid(r) - 1, sigmoid(f)),
        math.log(1 - sigmoid(f)),
        (0.0, -sigmoid(f)),
    ),
    "non_saturating": lambda r, f: (
        -math.log(sigmoid(r)) - math.log(1 - sigmoid(f)),
        (sigmoid(r) - 1, sigmoid(f)),
        -math.log(sigmoid(f)),
        (0.0, sigmoid(f) - 1),
    ),
    "hinge": lambda r, f: (
        hinge(r)[0] + hinge(-f)[0],
        (hinge(r)[1], -hinge(-f)[1]),
        -f,
        (0.0, -1.0),
    ),
    "least_squares": lambda r, f: (
        0.5 * (r - 1) ** 2 + 0.5 * f**2,
        (r - 1, f),
        0.5 * (f - 1) ** 2,
        (0.0, f - 1),
    ),
    "wasserstein": lambda r, f: (f - r, (-1.0, 1.0), -f, (0.0, -1.0)),
    "relativistic": lambda r, f: (
        -math.log(sigmoid(r - f)),
        (sigmoid(r - f) - 1, 1 - sigmoid(r - f)),
        -math.log(sigmoid(f - r)),
        (1 - sigmoid(f - r), sigmoid(f - r) - 1),
    ),
}


def derivatives(losses, *logits):
    return torch.autograd.grad(losses.sum(), logits, materialize_grads=True)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_its_derivatives_are_those_of_the_paper(name):
    real = torch.tensor(REAL[:-1], dtype=torch.float32, requires_grad=True)
    fake = torch.tensor(FAKE[:-1], dtype=torch.float32, requires_grad=True)
    by_discriminator = discriminator_loss(name, real, fake)
    by_generator = generator_loss(name, fake, real if name in NEEDS_REAL else None)
    expected = [REFERENCES[name](r, f) for r, f in zip(real.tolist(), fake.tolist(), strict=True)]
    for losses, place in ((by_discriminator, 0), (by_generator, 2)):
        assert losses.tolist() == pytest.approx([e[place] for e in expected], rel=1e-5, abs=1e-6)
        for side, slope in enumerate(derivatives(losses, real, fake)):
            slopes = [e[place + 1][side] for e in expected]
            assert slope.tolist() == pytest.approx(slopes, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_low_precision_and_large_logits_are_no_matter(name):
    real, fake = torch.tensor(REAL).bfloat16(), torch.tensor(FAKE).bfloat16()
    given = real if name in NEEDS_REAL else None
    losses = [discriminator_loss(name, real, fake), generator_loss(name, fake, given)]
    for loss in losses:
        assert loss.dtype == torch.float32
        assert loss.isfinite().all()


def test_discriminator_that_cannot_tell_has_the_known_loss():
    zero = torch.zeros(1)
    known = {"saturating": 2 * math.log(2), "non_saturating": 2 * math.log(2), "hinge": 2.0}
    known |= {"least_squares": 0.5, "wasserstein": 0.0, "relativistic": math.log(2)}
    assert {n: discriminator_loss(n, zero, zero).item() for n in LOSSES} == pytest.approx(known)


@pytest.mark.parametrize(
    ("name", "logits"),
    [
        ("non_saturating", math.log(3)),  # D = 3/4 = p / (p + q), Goodfellow et al., equation 2
        ("least_squares", 0.75),  # (b p + a q) / (p + q), Mao et al., equation 5
    ],
)
def test_best_logit_is_where_the_theory_has_it(name, logits):
    """Where a point is real three times in four."""
    logit = torch.tensor(logits, requires_grad=True)
    never = torch.tensor(0.0)  # what is subtracted to leave one term alone
    as_real = discriminator_loss(name, logit, never)
    as_fake = discriminator_loss(name, never, logit)
    (slope,) = torch.autograd.grad(0.75 * as_real + 0.25 * as_fake, logit)
    assert slope.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_discriminator_that_cannot_tell_is_sure_of_nothing(name):
    unsure = {"least_squares": 0.5, "wasserstein": 7.0, "relativistic": -3.0}.get(name, 0.0)
    logit = torch.full((2,), unsure, requires_grad=True)
    discriminator_loss(name, logit, logit).sum().backward()
    assert logit.grad is not None
    assert logit.grad.abs().max() < 1e-6  # there is nothing to gain by another
    objective = SimpleNamespace(name=name, pairs=name in NEEDS_REAL)
    margin = Objective.margin(objective, logit, logit)  # pyright: ignore[reportArgumentType]
    assert margin.tolist() == [0.0, 0.0]
    assert (Objective.margin(objective, logit + 1, logit) > 0).all()  # pyright: ignore[reportArgumentType]


def test_relativistic_loss_does_not_see_a_constant():
    torch.manual_seed(0)
    real, fake = torch.randn(2, 9)
    for loss in (discriminator_loss, generator_loss):
        shifted = loss("relativistic", real + 5, fake + 5)
        torch.testing.assert_close(shifted, loss("relativistic", real, fake))


def test_unknown_loss_is_refused():
    with pytest.raises(ValueError, match=r"module\.loss\.name=lsgan -> unknown -> choose one"):
        check_loss("lsgan")
    check_loss("hinge")


class Quadratic(nn.Module):
    """D(x) = x' A x / 2 + b' x, of each image."""

    def __init__(self, size):
        super().__init__()
        self.square = nn.Parameter(torch.randn(size, size, dtype=torch.float64))
        self.linear = nn.Parameter(torch.randn(size, dtype=torch.float64))

    def forward(self, images):
        points = images.flatten(1)
        return ((points @ self.square) * points).sum(1) / 2 + points @ self.linear


def test_squared_gradient_and_its_gradient_are_those_of_a_quadratic():
    torch.manual_seed(0)
    network, images = Quadratic(12), torch.randn(3, 3, 2, 2, dtype=torch.float64)
    images.requires_grad_()
    penalty = squared_gradient(network(images), images)
    symmetric = (network.square + network.square.T).detach() / 2
    gradient = images.detach().flatten(1) @ symmetric + network.linear.detach()  # [B, CHW]
    torch.testing.assert_close(penalty, gradient.square().sum(1))
    by_square, by_linear = torch.autograd.grad(penalty.sum(), list(network.parameters()))
    torch.testing.assert_close(by_linear, 2 * gradient.sum(0))
    outer = gradient.T @ images.detach().flatten(1)
    torch.testing.assert_close(by_square, outer + outer.T)


def test_gradient_norm_penalty_is_that_of_a_linear_discriminator():
    weight = torch.tensor([1.0, -2.0, 2.0, 4.0], requires_grad=True)  # of norm 5
    images = torch.randn(3, 1, 2, 2, requires_grad=True)
    penalty = gradient_norm_penalty(images.flatten(1) @ weight, images)
    torch.testing.assert_close(penalty, torch.full((3,), 16.0))
    (slope,) = torch.autograd.grad(penalty.sum(), weight)
    torch.testing.assert_close(slope, 3 * 2 * 4 * weight.detach() / 5)


def test_gradient_norm_penalty_of_no_gradient_is_finite():
    weight = torch.zeros(4, requires_grad=True)
    images = torch.randn(2, 1, 2, 2, requires_grad=True)
    penalty = gradient_norm_penalty(images.flatten(1) @ weight, images)
    (slope,) = torch.autograd.grad(penalty.sum(), weight)
    assert penalty.tolist() == [1, 1]
    assert slope.tolist() == [0] * 4


def test_interpolated_points_lie_evenly_between_the_pairs():
    keys = torch.arange(2000)
    real, fake = torch.full((2000, 2, 3, 3), 5.0), torch.full((2000, 2, 3, 3), 3.0)
    points = interpolate(real, fake, keys, 4)
    assert torch.equal(points, points[:, :1, :1, :1].expand_as(points))  # one share an image
    shares = (points[:, 0, 0, 0] - 3) / 2
    assert shares.min() >= 0
    assert shares.max() <= 1
    assert shares.mean().item() == pytest.approx(0.5, abs=0.02)
    assert shares.std().item() == pytest.approx(1 / math.sqrt(12), abs=0.01)
    assert torch.equal(interpolate(real[:9], fake[:9], keys[:9], 4), points[:9])
    assert not interpolate(real.requires_grad_(), fake, keys, 4).requires_grad


def test_lazy_rates_forget_in_k_and_one_steps_what_k_did():
    lr, betas = lazy_rates(0.002, (0.0, 0.99), 16)
    assert lr * 17 == pytest.approx(0.002 * 16)
    assert betas[0] == 0
    assert betas[1] ** 17 == pytest.approx(0.99**16)
