"""Parameters without storage get the values that the module says, one whole tensor at a time."""

import weakref

import lightning
import pytest
import torch
from torch import nn

from modules.gpt import GPT
from tests.trainers.fsdp_modules import TinyGPT
from trainers.strategies.initial_values import (
    give_initial_values,
    names_on_meta,
    refuse_buffers_on_meta,
)


class Module(lightning.LightningModule):
    """Three layers on the meta device, two of which share their weight; one on the CPU."""

    def __init__(self):
        super().__init__()
        with torch.device("meta"):
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.layers[2].weight = self.layers[0].weight
        self.own = nn.Linear(2, 2)
        self.alive, self.most_alive = [], 0

    def initial_value(self, name):
        self.alive = [reference for reference in self.alive if reference() is not None]
        self.most_alive = max(self.most_alive, len(self.alive) + 1)
        value = torch.full(self.get_parameter(name).shape, float(len(name)))
        self.alive.append(weakref.ref(value))
        return value


def test_only_parameters_without_storage_are_filled_and_shared_ones_once():
    module, kept = Module(), []
    names = names_on_meta(module)
    give_initial_values(module, names, lambda leaf, name, parameter, value: kept.append(name))
    expected = [f"layers.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")]
    expected.remove("layers.2.weight")
    assert kept == names == expected


def test_callback_gets_leaf_parameter_and_value():
    module = Module()

    def check(leaf, name, parameter, value):
        path, _, own = name.rpartition(".")
        assert leaf is module.get_submodule(path)
        assert parameter is getattr(leaf, own)
        assert torch.equal(value, torch.full(parameter.shape, float(len(name))))

    give_initial_values(module, names_on_meta(module), check)


def test_one_whole_tensor_lives_at_a_time():
    module = Module()
    give_initial_values(module, names_on_meta(module), lambda *_: None)
    assert module.most_alive == 1
    held = []  # who keeps what it is given is noticed
    give_initial_values(module, names_on_meta(module), lambda *each: held.append(each))
    assert module.most_alive == len(held)


def test_values_are_drawn_on_the_cpu_wherever_modules_are_built():
    module, devices = Module(), set()

    def note(leaf, name, parameter, value):
        devices.add(value.device)

    with torch.device("meta"):  # as Lightning makes an accelerator the default
        give_initial_values(
            module, names_on_meta(module), lambda *each: devices.add(each[3].device)
        )
    assert devices == {torch.device("cpu")}


def test_gpt_starts_as_it_fills_itself():
    one, other = TinyGPT("modern_tiny"), TinyGPT("modern_tiny")
    one.configure_model()
    names = names_on_meta(other)
    other.to_empty(device="cpu")

    def keep(leaf, name, parameter, value):
        parameter.data.copy_(value)

    give_initial_values(other, names, keep)
    assert isinstance(other, GPT)
    assert len(names) == len(list(one.parameters()))
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name))


def test_module_that_says_no_values_is_refused():
    module = lightning.LightningModule()
    with torch.device("meta"):
        module.layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"module=LightningModule -> .*layer.weight.* -> give it"):
        give_initial_values(module, names_on_meta(module), lambda *_: None)
    give_initial_values(module, [], lambda *_: None)  # nothing to say


def test_value_of_another_shape_is_refused():
    module = Module()
    module.initial_value = lambda name: torch.zeros(4)
    with pytest.raises(ValueError, match=r"initial_value\('layers.0.weight'\) .* \[4\] .*\[4, 4\]"):
        give_initial_values(module, names_on_meta(module), lambda *_: None)


def test_buffer_without_storage_is_refused():
    module = Module()
    refuse_buffers_on_meta(module)
    module.register_buffer("table", torch.zeros(2, device="meta"))
    with pytest.raises(ValueError, match=r"buffer `table` is on the meta device.* -> make it"):
        refuse_buffers_on_meta(module)
