"""Each network against its paper, written again of plain torch, and its published sizes."""

import pytest
import torch

from modules.gan_networks import build_networks
from modules.gan_presets import PRESETS, R3GANShape
from modules.gan_r3gan import GROUP_WIDTH, Resampling, widths_of
from tests.modules.gan_references import REFERENCES, build, fir_down, fir_up, stir

CASES = [
    ("dcgan_tiny", 28, {}),
    ("dcgan_tiny", 32, {"width_factor": 1 / 64}),
    ("dcgan_tiny", 64, {"width_factor": 1 / 128}),
    ("sngan_tiny", 32, {}),
    ("sngan_tiny", 64, {"width_factor": 1 / 64}),
    ("sngan_tiny", 128, {"width_factor": 1 / 64}),
    ("r3gan_tiny", 8, {}),
    ("r3gan_tiny", 64, {"width_factor": 1 / 32, "blocks_per_stage": 2}),
]


@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize(("preset", "resolution", "overrides"), CASES)
def test_networks_equal_plain_torch(preset, resolution, overrides, num_classes):
    if preset == "dcgan_tiny":
        overrides = overrides | {"dropout": 0.0}
    networks = build(
        preset, resolution=resolution, channels=2, num_classes=num_classes, **overrides
    )
    generator = stir(networks[0].double())
    stir(networks[1].double())
    random = torch.Generator().manual_seed(1)
    noise = torch.randn(4, generator.noise_size, generator=random, dtype=torch.float64)
    labels = None if num_classes is None else torch.tensor([0, 2, 2, 1])
    with torch.no_grad():
        images = generator(noise, labels)
        pairs = [
            (reference(dict(network.state_dict()), value, labels), network(value, labels))
            for reference, network, value in zip(
                REFERENCES[preset], networks, (noise, images), strict=True
            )
        ]
    assert images.shape == (4, 2, resolution, resolution)
    for reference, ours in pairs:
        assert reference.std() > 1e-3
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)


def test_resampling_equals_zeros_between_pixels_and_a_filter():
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    resampling = Resampling().double()
    torch.testing.assert_close(resampling.up(x), fir_up(x))
    torch.testing.assert_close(resampling.down(x), fir_down(x))
    ones = torch.ones(1, 1, 8, 8, dtype=torch.float64)
    assert resampling.up(ones)[..., 1:-1, 1:-1].eq(1).all()
    assert resampling.down(ones)[..., 1:-1, 1:-1].eq(1).all()


def num_parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_dcgan_has_as_many_parameters_as_keras_counts():
    generator, discriminator = build("dcgan", resolution=28)
    moving_statistics = sum(buffer.numel() for buffer in generator.buffers())
    assert num_parameters(generator) == 2_305_472
    assert num_parameters(generator) + moving_statistics == 2_330_944
    assert num_parameters(discriminator) == 212_865


def test_sngan_has_the_published_layers():
    sizes = [num_parameters(network) for network in build("sngan", resolution=32, channels=3)]
    dense, up = 128 * 4096 + 4096, 2 * (9 * 256 * 256 + 256) + 256 * 256 + 256 + 4 * 256
    assert sizes[0] == dense + 3 * up + 2 * 256 + 9 * 256 * 3 + 3
    first = 9 * 3 * 128 + 128 + 9 * 128 * 128 + 128 + 3 * 128 + 128
    plain = 2 * (9 * 128 * 128 + 128)
    assert sizes[1] == first + 3 * plain + 128 * 128 + 128 + 129


def test_r3gan_s_rule_gives_the_authors_networks():
    shape = PRESETS["r3gan"]
    assert isinstance(shape, R3GANShape)
    published = {
        32: ([1024] * 4, [32] * 4),
        64: ([1024] * 4 + [512], [32] * 4 + [16]),
        256: ([1024] * 4 + [512, 256, 128], [32] * 4 + [16, 8, 4]),
    }
    for resolution, (widths, groups) in published.items():
        ours = widths_of(shape, resolution)
        assert ours == [3 * width // 4 for width in widths]
        assert [2 * width // GROUP_WIDTH for width in ours] == [3 * group for group in groups]


def test_r3gan_has_the_published_layers():
    networks = build("r3gan", resolution=32, channels=3)
    block = 2 * 768 * 1536 + 1536 * 16 * 9 + 2 * 1536
    assert num_parameters(networks[0]) == 8 * block + 16 * 768 + 64 * 768 + 3 * 768
    assert num_parameters(networks[1]) == 8 * block + 3 * 768 + 16 * 768 + 768


@pytest.mark.parametrize("preset", ["dcgan", "sngan", "r3gan"])
def test_width_factor_scales_every_layer(preset):
    sizes = [
        build_networks(
            preset, {"width_factor": f}, resolution=64, channels=1, num_classes=None, seed=0
        )
        for f in (1 / 16, 1 / 8)
    ]
    for small, large in zip(*sizes, strict=True):
        shapes = [{name: p.shape for name, p in n.named_parameters()} for n in (small, large)]
        assert shapes[0].keys() == shapes[1].keys()
        assert 2 < num_parameters(large) / num_parameters(small) < 4.1
