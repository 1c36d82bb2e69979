import copy
import pickle
import re
from typing import Any

import pytest
import torch
from torch.func import functional_call

from modules.gan_layers import Generator
from modules.gan_networks import build_networks
from modules.gan_presets import PRESETS
from tests.modules.gan_references import build, stir

# The smallest network of each kind.
SMALLEST: dict[str, dict[str, Any]] = {
    "dcgan_tiny": {"resolution": 28, "width_factor": 1 / 64, "dropout": 0.0},
    "sngan_tiny": {"resolution": 32, "width_factor": 1 / 64},
    "r3gan_tiny": {"resolution": 8, "width_factor": 1 / 96},
}
small = pytest.mark.parametrize("preset", SMALLEST)
conditional = pytest.mark.parametrize("num_classes", [None, 3])


def build_smallest(preset, **options):
    return build(preset, **SMALLEST[preset] | options)


LABELS = torch.tensor([0, 2, 2, 1])


def inputs(network, preset, dtype=torch.float32) -> Any:
    """What the network takes for four samples: noise or images, and labels."""
    random = torch.Generator().manual_seed(1)
    side = SMALLEST[preset]["resolution"]
    size = (network.noise_size,) if hasattr(network, "noise_size") else (1, side, side)
    x = torch.randn(4, *size, generator=random, dtype=dtype)
    return x, None if network.num_classes is None else LABELS


@conditional
@small
def test_every_parameter_gets_a_gradient(preset, num_classes):
    networks = build_smallest(preset, num_classes=num_classes)
    generator, discriminator = (stir(network) for network in networks)
    noise, labels = inputs(generator, preset)
    images = generator(noise, labels)
    logits = discriminator(images, labels)
    assert logits.shape == (4,)
    logits.square().sum().backward()
    for network in networks:
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


def penalty(discriminator, parameters, images, labels):
    """Summed |grad D(x)|^2, as R1 has it."""
    logits = functional_call(discriminator, parameters, (images, labels))
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.square().sum()


@conditional
@small
def test_penalty_on_a_gradient_has_the_right_gradient(preset, num_classes):
    _, discriminator = build_smallest(preset, num_classes=num_classes)
    images, labels = inputs(stir(discriminator.double()), preset, torch.float64)
    images.requires_grad_()
    parameters = dict(discriminator.named_parameters())
    value = penalty(discriminator, parameters, images, labels)
    gradients = torch.autograd.grad(value, [*parameters.values()], allow_unused=True)
    assert value > 1e-8
    random = torch.Generator().manual_seed(2)
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        way = torch.randn(parameter.shape, dtype=torch.float64, generator=random)
        ends = [
            penalty(discriminator, parameters | {name: parameter + step * way}, images, labels)
            for step in (1e-6, -1e-6)
        ]
        slope = (ends[0] - ends[1]) / 2e-6
        ours = torch.zeros(()) if gradient is None else (gradient * way).sum()
        assert ours.item() == pytest.approx(slope.item(), rel=1e-4, abs=1e-6), name


@small
def test_weights_in_bf16_run_in_the_dtype_of_the_input(preset):
    for network in build_smallest(preset, num_classes=3):
        stir(network)
        rounded = copy.deepcopy(network)
        for low, wide in zip(network.parameters(), rounded.parameters(), strict=True):
            low.data = low.data.bfloat16()
            wide.data = low.data.float()
        x, labels = inputs(network, preset)
        out = network(x, labels)
        assert out.dtype == torch.float32
        assert torch.equal(out, rounded(x, labels))
        is_image = isinstance(network, Generator)  # logits are fp32 whatever comes in
        low = torch.bfloat16 if is_image else torch.float32
        assert network(x.bfloat16(), labels).dtype == low


@conditional
@small
def test_autocast_is_near_fp32(preset, num_classes):
    for network in build_smallest(preset, num_classes=num_classes):
        x, labels = inputs(stir(network), preset)
        with torch.autocast("cpu", torch.bfloat16):
            low = network(x, labels)
        wide = network(x, labels)
        assert ((low - wide).norm() / wide.norm()).item() < 0.05
        assert not torch.equal(low, wide)


@small
def test_generator_is_copied_and_pickled_with_all_it_needs(preset):
    generator, discriminator = build_smallest(preset, num_classes=3)
    noise, labels = inputs(generator, preset)
    images = generator(noise, labels)
    assert torch.equal(copy.deepcopy(generator)(noise, labels), images)
    again = pickle.loads(pickle.dumps(discriminator))
    assert torch.equal(again(images, labels), discriminator(images, labels))
    assert len(generator.blocks) >= 2
    assert all(block in [*generator.modules()] for block in generator.blocks)
    assert all(block in [*discriminator.modules()] for block in discriminator.blocks)


@small
def test_initial_values_depend_on_seed_and_name_alone(preset):
    networks = build_smallest(preset, seed=3)
    torch.rand(7)  # the global generator has no part in it
    state = torch.get_rng_state()
    again = build_smallest(preset, seed=3, channels=3)  # other layers, elsewhere
    assert torch.equal(torch.get_rng_state(), state)
    other = build_smallest(preset, seed=4)
    for network, same, unlike in zip(networks, again, other, strict=True):
        values = dict(same.named_parameters())
        for name, value in network.named_parameters():
            if value.shape == values[name].shape:
                assert torch.equal(value, values[name]), name
        assert any(
            not torch.equal(value, unlike.get_parameter(name))
            for name, value in network.named_parameters()
        )
    weights = [w for n in networks for w in n.parameters() if w.dim() > 1 and w.std() > 0]
    assert len({weight.flatten()[0].item() for weight in weights}) == len(weights)


@pytest.mark.parametrize(
    ("preset", "part", "name", "deviation"),
    [
        ("dcgan", 0, "layers.0.conv.weight", (2 / (25 * 384)) ** 0.5),
        ("dcgan", 0, "embedding.weight", 1.0),
        ("dcgan", 1, "layers.1.conv.weight", (2 / (25 * 192)) ** 0.5),
        ("sngan", 0, "layers.0.conv1.weight", (4 / (9 * 512)) ** 0.5),
        ("sngan", 0, "layers.0.shortcut.weight", (2 / 512) ** 0.5),
        ("sngan", 0, "layers.0.norm1.bias", 0.0),
        ("sngan", 1, "layers.1.conv2.weight", (4 / (9 * 256)) ** 0.5),
        ("r3gan", 0, "basis.basis", 1.0),
        ("r3gan", 0, "basis.linear.weight", 128**-0.5),
        ("r3gan", 0, "embedding.weight", 0.1),
        ("r3gan", 0, "stages.1.1.conv1.weight", (2 / 1.04 / 768) ** 0.5 * 6**-0.25),
        ("r3gan", 1, "stages.1.1.conv2.weight", (2 / 1.04 / 144) ** 0.5 * 6**-0.25),
        ("r3gan", 1, "stages.1.1.conv3.weight", 0.0),
        ("r3gan", 1, "basis.weight", 0.25),
        ("r3gan", 1, "embedding.weight", (100 * 768) ** -0.5),
    ],
)
def test_initial_values_have_the_scheme_s_deviations(big_networks, preset, part, name, deviation):
    value = dict(big_networks(preset)[part].named_parameters())[name]
    assert value.std().item() == pytest.approx(deviation, rel=0.04)


@pytest.fixture(scope="module")
def big_networks():
    """Build a preset as published, once, for 100 classes."""
    built = {}

    def of(preset):
        if preset not in built:
            resolution = {"dcgan": 28, "sngan": 32, "r3gan": 16}[preset]
            built[preset] = build(preset, resolution=resolution, channels=3, num_classes=100)
        return built[preset]

    return of


def test_dropout_acts_in_training_only():
    _, discriminator = build("dcgan_tiny", resolution=28)
    images = torch.randn(2, 1, 28, 28)
    assert not torch.equal(discriminator(images), discriminator(images))
    discriminator.eval()
    assert torch.equal(discriminator(images), discriminator(images))


@pytest.mark.parametrize("preset", ["dcgan_tiny", "sngan_tiny"])
def test_without_batch_norm_samples_are_independent(preset):
    for norm in ("none", "batch"):
        generator, _ = build_smallest(preset, num_classes=3, norm=norm)
        noise, labels = inputs(stir(generator), preset)
        whole = generator(noise, labels)
        parts = torch.cat([generator(noise[i : i + 2], labels[i : i + 2]) for i in (0, 2)])
        assert torch.allclose(whole, parts, atol=1e-5) == (norm == "none")


@small
def test_discriminators_judge_samples_independently(preset):
    _, discriminator = build_smallest(preset, num_classes=3)
    images, labels = inputs(stir(discriminator), preset)
    parts = [discriminator(images[i : i + 1], labels[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(discriminator(images, labels), torch.cat(parts))


@small
def test_labels_matter_and_are_asked_for(preset):
    for network in build_smallest(preset, num_classes=3):
        x, _ = inputs(stir(network), preset)
        out, other = network(x, LABELS), network(x, torch.tensor([0, 2, 2, 0]))
        assert not torch.allclose(out[3], other[3])
        with pytest.raises(
            ValueError, match=r"module.conditional=true -> no labels were given to a con"
        ):
            network(x)
    for network in build_smallest(preset):
        with pytest.raises(
            ValueError, match=r"module.conditional=false -> labels were given to an uncon"
        ):
            network(inputs(network, preset)[0], LABELS)


@pytest.mark.parametrize(
    ("preset", "resolution", "overrides", "message"),
    [
        ("dcgan_tinny", 28, {}, "module.preset=dcgan_tinny -> unknown -> did you mean dcgan_tiny"),
        ("dcgan", 48, {}, "datamodule.resolution=48 -> a DCGAN has layers for 28, 32, 64 pixels"),
        ("sngan", 28, {}, "datamodule.resolution=28 -> an SNGAN has blocks for 32, 64, 128 pixels"),
        ("r3gan", 28, {}, "datamodule.resolution=28 -> R3GAN doubles 4 pixels"),
        ("r3gan", 4, {}, "datamodule.resolution=4 -> R3GAN doubles 4 pixels"),
        ("r3gan", 8, {"norm": "none"}, "module.network.norm -> no such key"),
        ("sngan", 32, {"dropout": 0.1}, "module.network.dropout -> no such key"),
        ("dcgan", 28, {"blocks_per_stage": 1}, "module.network.blocks_per_stage -> no such key"),
        ("dcgan", 28, {"norm": "layer"}, "module.network.norm=layer -> unknown"),
        ("sngan", 32, {"norm": "layer"}, "module.network.norm=layer -> unknown"),
        ("dcgan", 28, {"dropout": 1.0}, "dropout=1.0 -> it is a probability"),
        ("sngan", 32, {"width_factor": 0.0}, "module.network.width_factor=0.0 -> leaves nothing"),
        ("r3gan", 8, {"noise_size": 0}, "noise_size=0 -> it is a whole number"),
        ("r3gan", 8, {"blocks_per_stage": 0}, "blocks_per_stage=0 -> it is a whole number"),
    ],
)
def test_impossible_network_is_refused_by_its_key(preset, resolution, overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(preset, resolution=resolution, **overrides)


def test_overrides_that_are_null_may_be_of_another_kind():
    everything = {name: None for shape in PRESETS.values() for name in vars(shape)}
    build_networks("r3gan_tiny", everything, resolution=8, channels=1, num_classes=None, seed=0)
