import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from modules.gan_initial_values import scaled_normal
from modules.gan_layers import Conv2d, Embedding, Linear, Network
from modules.gan_norms import BatchNorm, SpectralNorm


class Layers(Network):
    """A network of one layer, or several."""

    def __init__(self, *layers):
        super().__init__(layers, resolution=1, channels=1, num_classes=None)
        self.initialise("layers", seed=1)

    def _build(self, shape, resolution, channels, num_classes):
        self.layers = nn.Sequential(*shape)

    def forward(self, x):
        return self.layers(x)


def linear(inputs=6, outputs=4) -> Any:
    return Linear(inputs, outputs, has_bias=True, draw=scaled_normal, is_spectral=True)


def conv(inputs=3, outputs=4) -> Any:
    return Conv2d(inputs, outputs, 3, has_bias=True, draw=scaled_normal, is_spectral=True)


def random(*size, seed=0, dtype=torch.float32):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def vectors(network):
    return {
        name: value.clone() for name, value in network.named_buffers() if name[-2:] in (".u", ".v")
    }


def move_weights(network, seed):
    with torch.no_grad():
        for index, parameter in enumerate(network.parameters()):
            parameter.add_(random(*parameter.shape, seed=seed + 100 * index), alpha=0.1)


def to_torch(layer: Any) -> Any:
    """Torch's layer with its spectral norm, at the same weights and singular vectors."""
    kinds = {
        Conv2d: (partial(nn.Conv2d, padding=1), 3, 4, 3),
        Linear: (nn.Linear, 6, 4),
        Embedding: (nn.Embedding, 5, 4),
    }
    kind, *sizes = kinds[type(layer)]
    theirs: Any = parametrizations.spectral_norm(kind(*sizes))
    parametrization = theirs.parametrizations.weight
    with torch.no_grad():
        parametrization.original.copy_(layer.weight)
        parametrization[0]._u.copy_(layer.spectral_norm.u)
        parametrization[0]._v.copy_(layer.spectral_norm.v)
        if layer.bias is not None:
            theirs.bias.copy_(layer.bias)
    return theirs, parametrization.original


@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_spectral_norm_equals_torch_s(kind):
    if kind == "embedding":
        layer, x = Embedding(5, 4, draw=scaled_normal, is_spectral=True), torch.tensor([0, 3, 3])
    else:
        layer, x = (linear(), random(2, 6)) if kind == "linear" else (conv(), random(2, 3, 5, 5))
    network = Layers(layer)
    move_weights(network, seed=5)
    theirs, their_weight = to_torch(layer)
    for step in range(3):
        network.refresh()
        ours = layer(x, torch.float32) if kind == "embedding" else network(x)
        reference = theirs(x)  # which makes an iteration with each forward
        torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-6)
        gradient = torch.autograd.grad(ours.square().sum(), layer.weight)
        torch.testing.assert_close(
            gradient, torch.autograd.grad(reference.square().sum(), their_weight)
        )
        with torch.no_grad():
            change = random(*layer.weight.shape, seed=step)
            layer.weight.add_(change, alpha=0.3)
            their_weight.add_(change, alpha=0.3)


def test_spectral_norm_starts_near_the_largest_singular_value():
    for layer in (linear(20, 30), conv(8, 16)):
        Layers(layer)
        assert layer.spectral_norm is not None
        weight = layer.spectral_norm(layer.weight).detach()
        assert torch.linalg.matrix_norm(weight.flatten(1), 2).item() == pytest.approx(1, abs=0.03)


def test_singular_vectors_move_at_the_forward_after_a_refresh_only():
    network, x = Layers(linear(), nn.Tanh(), linear(4, 3)), random(2, 6)
    start = vectors(network)
    move_weights(network, seed=1)
    first = network(x)
    assert torch.equal(network(x), first)
    assert all(torch.equal(value, start[name]) for name, value in vectors(network).items())
    network.refresh()
    network.eval()
    network(x)
    assert all(torch.equal(value, start[name]) for name, value in vectors(network).items())
    network.train()
    second = network(x)
    moved = vectors(network)
    assert not any(torch.equal(value, start[name]) for name, value in moved.items())
    assert not torch.equal(second, first)
    assert torch.equal(network(x), second)
    assert all(torch.equal(value, moved[name]) for name, value in vectors(network).items())


def gradients_of(network, x, *, is_recomputed):
    network.refresh()
    out = checkpoint(network, x, use_reentrant=False) if is_recomputed else network(x)
    gradients = torch.autograd.grad(out.square().sum(), [*network.parameters()])
    return torch.cat([gradient.flatten() for gradient in gradients]), vectors(network)


def test_recomputation_sees_the_same_spectral_norm():
    x = random(2, 6)
    plain = Layers(linear(), nn.Tanh(), linear(4, 3))
    move_weights(plain, seed=1)
    recomputed, restless = copy.deepcopy(plain), copy.deepcopy(plain)
    for module in restless.modules():  # as without the contract: each forward is due
        if isinstance(module, SpectralNorm):
            module.register_forward_pre_hook(lambda norm, _: setattr(norm, "is_due", True))
    reference, moved = gradients_of(plain, x, is_recomputed=False)
    gradient, vectors_then = gradients_of(recomputed, x, is_recomputed=True)
    assert torch.equal(gradient, reference)
    assert all(torch.equal(value, moved[name]) for name, value in vectors_then.items())
    gradient, vectors_then = gradients_of(restless, x, is_recomputed=True)
    assert not torch.allclose(gradient, reference, rtol=1e-4)
    assert not any(torch.equal(value, moved[name]) for name, value in vectors_then.items())


def test_backward_may_come_after_singular_vectors_moved_on():
    network, x = Layers(linear()), random(2, 6)
    early = network(x).square().sum()
    reference = torch.autograd.grad(network(x).square().sum(), [*network.parameters()])
    network.refresh()
    network(random(2, 6, seed=1))
    for gradient, expected in zip(
        torch.autograd.grad(early, [*network.parameters()]), reference, strict=True
    ):
        torch.testing.assert_close(gradient, expected)


def test_autocast_leaves_power_iteration_in_fp32():
    network, x = Layers(linear()), random(2, 6)
    move_weights(network, seed=1)
    fp32 = copy.deepcopy(network)
    for each, is_low in ((network, True), (fp32, False)):
        each.refresh()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_low):
            assert each(x).dtype == (torch.bfloat16 if is_low else torch.float32)
    for name, value in vectors(network).items():
        assert torch.equal(value, vectors(fp32)[name])


def batch_norm(num_classes=None, channels=3, **options) -> Any:
    settings: dict[str, Any] = {"momentum": 0.01, "epsilon": 1e-3, "is_normalising": True} | options
    layer = BatchNorm(channels, num_classes=num_classes, **settings)
    Layers(layer)
    move_weights(layer, seed=3)
    return layer


@pytest.mark.parametrize("size", [(4, 3), (4, 3, 5, 5)])
def test_batch_norm_equals_torch_s(size):
    layer = batch_norm()
    theirs = (nn.BatchNorm1d if len(size) == 2 else nn.BatchNorm2d)(3, eps=1e-3, momentum=0.01)
    x = random(*size)
    theirs.load_state_dict(layer.state_dict(), strict=False)
    for seed in range(3):
        x = 2 + 3 * random(*size, seed=seed)
        torch.testing.assert_close(layer(x), theirs(x))
    layer.eval()
    theirs.eval()
    assert layer.running_mean.abs().min() > 0
    torch.testing.assert_close(layer(x), theirs(x))


def test_class_conditional_batch_norm_looks_gains_up():
    layer, labels = batch_norm(num_classes=4), torch.tensor([3, 0, 3, 1])
    x = random(4, 3, 5, 5)
    plain = F.batch_norm(x, None, None, training=True, eps=1e-3)
    for index, label in enumerate(labels):
        gain, bias = layer.weight[label], layer.bias[label]
        expected = plain[index] * gain[:, None, None] + bias[:, None, None]
        torch.testing.assert_close(layer(x, labels)[index], expected)


def test_batch_norm_s_moving_averages_ignore_recomputation():
    x = random(4, 3, 5, 5)
    layers = [batch_norm() for _ in range(2)]
    control = nn.BatchNorm2d(3, momentum=0.01)
    gradients = []
    for layer, is_recomputed in ((layers[0], False), (layers[1], True)):
        out = checkpoint(layer, x, use_reentrant=False) if is_recomputed else layer(x)
        gradients.append(torch.autograd.grad(out.square().sum(), layer.weight))
    torch.testing.assert_close(*gradients)
    assert torch.equal(layers[0].running_mean, layers[1].running_mean)
    assert torch.equal(layers[0].running_var, layers[1].running_var)
    checkpoint(control, x, use_reentrant=False).square().sum().backward()
    assert not torch.allclose(control.running_mean, layers[0].running_mean)  # type: ignore


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e25])  # whose square is too large
def test_what_is_not_finite_does_not_move_averages(bad):
    """Of its channel; those of others are as always, and so is what comes out."""
    layer, undisturbed = batch_norm(), batch_norm()
    theirs = nn.BatchNorm2d(3, eps=1e-3, momentum=0.01)
    theirs.load_state_dict(layer.state_dict(), strict=False)
    x = random(4, 3, 5, 5)
    undisturbed(x)
    x[2, 1, 0, 0] = bad
    before = layer.running_mean.clone(), layer.running_var.clone()
    torch.testing.assert_close(layer(x), theirs(x), equal_nan=True)
    for name, old in zip(("running_mean", "running_var"), before, strict=True):
        average, expected = getattr(layer, name), getattr(undisturbed, name).clone()
        expected[1] = old[1]
        assert torch.equal(average, expected)
    assert not theirs.running_var.isfinite().all()  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("num_classes", [None, 4])
def test_statistics_stay_fp32_in_a_network_cast_to_bf16(num_classes):
    layer, labels = batch_norm(num_classes), torch.tensor([3, 0, 3, 1])
    start = layer.running_mean.copy_(torch.tensor([0.1, 0.2, 0.3])).clone()
    norm = Layers(linear()).bfloat16().layers[0].spectral_norm  # type: ignore[union-attr]
    assert norm.u.dtype == norm.v.dtype == torch.float32  # type: ignore[union-attr]
    layer.bfloat16()
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.running_mean, start)
    x = (1 + random(4, 3, 5, 5)).bfloat16()
    out = layer(x, labels)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(layer.running_mean, 0.99 * start + 0.01 * x.float().mean((0, 2, 3)))


def test_without_normalising_gains_and_biases_are_left():
    layer, labels = batch_norm(num_classes=4, is_normalising=False), torch.tensor([3, 0])
    x = random(2, 3)
    torch.testing.assert_close(layer(x, labels), x * layer.weight[labels] + layer.bias[labels])
    assert not [*layer.buffers()]
