import numpy as np
import pytest
import torch
from torch import nn

from modules.gan_pictures import (
    check_pictures,
    classes,
    cycle_labels,
    drawings,
    generate,
    grid,
    interpolation,
    neighbours,
    num_compared,
    slerp,
    tile,
    to_bytes,
    truncation,
)

GAP = 2
SIZE = 3


class Painter(nn.Module):
    """Paints images of one shade: the first number of the noise, and a tenth of the label."""

    def __init__(self, channels=1):
        super().__init__()
        self.channels, self.batches = channels, []

    def forward(self, noise, labels):
        assert not torch.is_grad_enabled()
        self.batches.append(len(noise))
        shade = noise[:, 0] + (0 if labels is None else labels / 10)
        return shade.view(-1, 1, 1, 1).expand(-1, self.channels, SIZE, SIZE)


def draws(count):
    """The first noises of a fixed sequence."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.rand(2, generator=generator) - 0.5 for _ in range(count)])


def shades(picture):
    """The shade of each tile, row by row."""
    step = SIZE + GAP
    return picture[GAP + 1 :: step, GAP + 1 :: step, 0]


def shade_of(values):
    return np.floor(np.asarray(values) * 127.5 + 127.5 + 0.5).astype(int)


def test_images_are_rounded_and_cut_to_bytes():
    images = torch.tensor([-1.2, -1.0, -0.999, 0.0, 0.999, 1.0, 7.0])
    assert to_bytes(images).tolist() == [0, 0, 0, 128, 255, 255, 255]
    stored = torch.arange(256)
    assert torch.equal(to_bytes(stored / 127.5 - 1), stored.byte())  # what the data becomes


def test_tiles_stand_apart_and_grey_ones_are_rgb():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).repeat(1, 1, 3, 4)
    picture = tile(images)
    assert (picture.dtype, picture.shape) == (np.uint8, (2 * 5 + 2, 3 * 6 + 2, 3))
    expected = np.full_like(picture, 255)
    for place in range(5):
        top, left = 2 + 5 * (place // 3), 2 + 6 * (place % 3)
        expected[top : top + 3, left : left + 4] = place
    assert np.array_equal(picture, expected)
    colour = torch.stack([torch.full((3, 4), shade) for shade in (10, 20, 30)]).byte()
    assert tile(colour[None])[2, 2].tolist() == [10, 20, 30]


def test_images_are_generated_a_few_at_a_time():
    network = Painter()
    assert generate(network, draws(150), None).shape == (150, 1, SIZE, SIZE)
    assert network.batches == [64, 64, 22]


def test_grid_is_of_the_first_noises_with_labels_in_turn():
    plain = grid(Painter(), draws, None, rows=2, columns=3)
    first = draws(6)[:, 0].numpy()
    assert np.array_equal(shades(plain).ravel(), shade_of(first))
    labelled = grid(Painter(), draws, 2, rows=2, columns=3)
    assert np.array_equal(shades(labelled).ravel(), shade_of(first + np.tile([0, 0.1], 3)))
    assert np.array_equal(grid(Painter(channels=3), draws, None, rows=2, columns=3), plain)


def test_slerp_keeps_the_norm_and_turns_evenly():
    first, second = torch.tensor([[2.0, 0.0]] * 5), torch.tensor([[0.0, 2.0]] * 5)
    walk = slerp(first, second, torch.linspace(0, 1, 5))
    angles = torch.linspace(0, torch.pi / 2, 5)
    torch.testing.assert_close(walk, 2 * torch.stack([angles.cos(), angles.sin()], 1))
    straight = slerp(first, 3 * first, torch.linspace(0, 1, 5))  # no arc between these
    torch.testing.assert_close(straight, first * torch.linspace(1, 3, 5)[:, None])


def test_interpolation_goes_from_noise_to_noise():
    picture = shades(interpolation(Painter(), draws, 3, rows=2, columns=5))
    ends, labels = draws(4)[:, 0].view(2, 2).numpy(), np.array([[0], [0.1]])
    assert np.array_equal(picture[:, [0, -1]], shade_of(ends + labels))
    assert len({*picture[0].tolist()}) == 5


def test_rows_of_truncation_scale_the_same_noises():
    picture = shades(truncation(Painter(), draws, None, psis=[1.0, 0.5, 0.0], columns=4))
    noise = draws(4)[:, 0].numpy()
    assert np.array_equal(picture, shade_of(np.stack([noise, noise / 2, 0 * noise])))


def test_rows_of_classes_have_the_same_noises():
    picture = shades(classes(Painter(), draws, 3, columns=4))
    noise = draws(4)[:, 0].numpy()
    assert np.array_equal(picture, shade_of(noise + np.array([[0], [0.1], [0.2]])))


def beside_generated(real, columns):
    return shades(neighbours(Painter(), draws, None, real=lambda: real, rows=3, columns=columns))


def test_nearest_real_images_stand_beside_generated_ones():
    shade = torch.randperm(256, generator=torch.Generator().manual_seed(1)).byte()  # four chunks
    real = shade.view(-1, 1, 1, 1).expand(-1, 1, SIZE, SIZE)
    picture = beside_generated(real, 4).astype(int)
    for generated, *found in picture:
        assert found[0] == generated  # the copy
        assert {*found[1:]} == {generated - 1, generated + 1}
    assert {*picture[:, 0].tolist()} == {*shade_of(draws(3)[:, 0]).tolist()}


def test_no_more_neighbours_stand_there_than_there_are_real_images():
    real = torch.tensor([0, 255]).byte().view(-1, 1, 1, 1).expand(-1, 1, SIZE, SIZE)
    assert beside_generated(real, 6).shape == (3, 3)


def test_real_images_are_floats_a_few_at_a_time(monkeypatch):
    sizes, plain = [], torch.cdist

    def watched(one, other, **options):
        sizes.append(len(other))
        return plain(one, other, **options)

    monkeypatch.setattr(torch, "cdist", watched)
    beside_generated(torch.zeros(150, 1, SIZE, SIZE, dtype=torch.uint8), 3)
    assert sizes == [64, 64, 22]


def test_few_large_images_are_compared_and_many_small_ones():
    assert num_compared(28 * 28, 6) == 4096
    assert num_compared(3 * 256 * 256, 6) == 341  # 64 MiB
    assert num_compared(64 * 2**20, 6) == 5  # what is shown


SETTINGS = {
    "grid": {"rows": 2, "columns": 2},
    "interpolation": {"rows": 1, "columns": 3},
    "truncation": {"psis": [1.0, 0.5], "columns": 2},
    "classes": {"columns": 2},
    "neighbours": {"rows": 1, "columns": 2},
}


def test_pictures_that_are_asked_for_and_possible_are_drawn():
    def settle(settings, num_classes):
        return drawings(
            network, settings=settings, noise=draws, num_classes=num_classes, real=lambda: real
        )

    real = torch.zeros(4, 1, SIZE, SIZE, dtype=torch.uint8)
    network = Painter()
    every = settle(SETTINGS, 3)
    assert [*every] == [*SETTINGS]
    assert not network.batches  # nothing before it is asked for
    for name, columns in (("grid", 2), ("neighbours", 2)):
        assert shades(every[name]()).shape[1] == columns
    assert np.array_equal(every["grid"](), grid(network, draws, 3, rows=2, columns=2))
    assert [*settle(SETTINGS, None)] == ["grid", "interpolation", "truncation", "neighbours"]
    assert "truncation" not in settle({**SETTINGS, "truncation": None}, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grind": {}}, r"module.pictures.grind=\{\} -> there is no such"),
        ({"grid": 5}, r"pictures.grid=5 -> it takes rows and columns -> "),
        ({"grid": {"rows": 2}}, r"pictures.grid=\{'rows': 2\} -> it takes rows and columns -> "),
        ({"classes": {"rows": 2, "columns": 2}}, r"pictures.classes=.* -> it takes columns -> "),
        ({"neighbours": {"rows": 1, "columns": 2, "real": 3}}, r"takes rows and columns -> "),
        ({"grid": {"rows": 0, "columns": 2}}, r"grid.rows=0 -> there is no room .* 1 or more, or"),
        ({"grid": {"rows": "two", "columns": 2}}, r"grid.rows=two -> there is no room"),
        ({"neighbours": {"rows": 1, "columns": 1}}, r"neighbours.columns=1 -> .* choose 2 or more"),
        ({"neighbours": {"rows": 1, "columns": 4098}}, r"columns=4098 -> there are 4096 real"),
        ({"truncation": {"psis": [], "columns": 2}}, r"psis=\[\] -> a row for each .* numbers, or"),
        ({"truncation": {"psis": ["a"], "columns": 2}}, r"psis=\['a'\] -> a row for each of them"),
    ],
)
def test_impossible_pictures_are_refused(settings, message):
    check_pictures({**SETTINGS, "grid": None})
    with pytest.raises(ValueError, match=message):
        check_pictures(settings)


def test_classes_are_chosen_among_those_of_the_network():
    like = torch.zeros(1)
    assert cycle_labels(range(5), None, like) is None
    for chosen, expected in ((None, [0, 1, 2, 0, 1]), ([2, 0], [2, 0, 2, 0, 2])):
        labels = cycle_labels(range(5), 3, like, chosen)
        assert labels is not None
        assert labels.tolist() == expected
        later = cycle_labels(range(2, 5), 3, like, chosen)
        assert later is not None
        assert later.tolist() == expected[2:]
    with pytest.raises(ValueError, match=r"classes=\[3\] -> the run's networks know no classes"):
        cycle_labels(range(5), None, like, [3])
    for wrong in ([9], [], 3, ["a"], [-1]):
        with pytest.raises(ValueError, match=r"classes=.* -> classes are numbers from 0 to 8"):
            cycle_labels(range(5), 9, like, wrong)
