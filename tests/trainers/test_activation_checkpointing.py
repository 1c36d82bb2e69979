import copy
import functools

import pytest
import torch
from torch import nn

from trainers.activation_checkpointing import ActivationCheckpointing


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = [
            nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, 16))
            for _ in range(4)
        ]
        self.layers = nn.Sequential(*self.blocks)

    def forward(self, x):
        return self.layers(x)


def gradients_and_saved_bytes(model):
    """Gradients of one step, and the bytes that autograd kept for it."""
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    torch.manual_seed(2)  # dropout
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(x).square().mean()
    loss.backward()
    parameters = {p.data_ptr() for p in model.parameters()}
    saved = sum(size for pointer, size in kept.items() if pointer not in parameters)
    return [p.grad.clone() for p in model.parameters()], saved


@functools.cache
def plain():
    return gradients_and_saved_bytes(Model())


@pytest.mark.parametrize("mode", ["full", "every_2", "selective"])
def test_recomputation_changes_memory_and_not_gradients(mode):
    model = Model()
    callback = ActivationCheckpointing(mode)
    callback.setup(None, model, "fit")
    gradients, saved = gradients_and_saved_bytes(model)
    for one, other in zip(gradients, plain()[0], strict=True):
        torch.testing.assert_close(one, other)
    if mode != "selective":  # what it keeps, it keeps past these hooks
        assert saved < plain()[1]
    callback.teardown(None, model, "fit")
    assert gradients_and_saved_bytes(Model())[1] == plain()[1]


def test_fewer_blocks_save_less():
    saved = {}
    for mode in ("none", "every_2", "full"):
        model = Model()
        ActivationCheckpointing(mode).setup(None, model, "fit")
        saved[mode] = gradients_and_saved_bytes(model)[1]
    assert saved["none"] > saved["every_2"] > saved["full"]


def test_selective_does_not_repeat_matrix_products():
    counts = {}

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            counts[mode] = counts.get(mode, 0) + (function is torch.ops.aten.addmm.default)
            return function(*args, **kwargs or {})

    for mode in ("full", "selective"):
        model = copy.deepcopy(Model())
        ActivationCheckpointing(mode).setup(None, model, "fit")
        with Count():
            model(torch.randn(8, 16)).sum().backward()
    # Recomputation stops once it has what backward needs: the last product of a block is not it.
    assert (counts["full"], counts["selective"]) == (4 * 3, 4 * 2)


@pytest.mark.parametrize("has_parts", [False, True])
def test_selective_recomputes_in_full_what_is_differentiated_twice(has_parts):
    model = Model()
    model.double_backward = ("model",)
    if has_parts:
        model.parts = {"model": model.layers}
    ActivationCheckpointing("selective").setup(None, model, "fit")
    x = torch.randn(8, 16, requires_grad=True)
    torch.manual_seed(2)
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    gradient.square().sum().backward()

    plain = Model()
    torch.manual_seed(2)
    (gradient,) = torch.autograd.grad(plain(x).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad)


class Recurrent(nn.Module):
    overwrites_products = True

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.GRU(4, 8)
        self.blocks = [self]

    def forward(self, x):
        return self.layer(x)[0]


def test_selective_recomputes_in_full_what_overwrites_its_products(monkeypatch):
    x = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(1))

    def gradients(mode):
        model = Recurrent()
        ActivationCheckpointing(mode).setup(None, model, "fit")
        gradients = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        return torch.cat([gradient.flatten() for gradient in gradients])

    assert torch.equal(gradients("selective"), gradients("none"))
    monkeypatch.setattr(Recurrent, "overwrites_products", False)  # the control
    assert (gradients("selective") - gradients("none")).abs().max() > 0.1


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="activation_checkpointing=every_0 -> no such mode"):
        ActivationCheckpointing("every_0")
