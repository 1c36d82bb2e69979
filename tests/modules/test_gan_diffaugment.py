import numpy as np
import pytest
import torch

from modules.gan_diffaugment import GROUPS, diffaugment
from modules.keyed_draws import uniform

OPS = [op for ops in GROUPS.values() for op in ops]
KEYS = torch.arange(40) * 7919
PURPOSE = 3


def images(channels=3, height=8, width=12):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(len(KEYS), channels, height, width, generator=generator) * 2 - 1


def changed(op, x):
    return diffaugment(x, KEYS, PURPOSE, ops=[op]).numpy()


def draws(place):
    return uniform(KEYS, PURPOSE, 7)[:, place].double().numpy()


@pytest.mark.parametrize("channels", [1, 3])
def test_colors_are_those_of_the_paper(channels):
    x = images(channels)
    for n, image in enumerate(x.double().numpy()):
        light, colorful, contrast = (draws(place)[n] for place in range(3))
        expected = {
            "brightness": image + light - 0.5,
            "saturation": image.mean(0) + 2 * colorful * (image - image.mean(0)),
            "contrast": image.mean() + (0.5 + contrast) * (image - image.mean()),
        }
        for op, value in expected.items():
            np.testing.assert_allclose(changed(op, x)[n], value, atol=1e-6)


def test_translation_moves_zeros_in():
    x, seen = images(), set()
    for n, image in enumerate(x.numpy()):
        down, across = (int(draws(3)[n] * 3) - 1, int(draws(4)[n] * 5) - 2)  # an eighth, rounded
        padded = np.pad(image, ((0, 0), (1, 1), (2, 2)))
        expected = padded[:, 1 + down : 9 + down, 2 + across : 14 + across]
        np.testing.assert_array_equal(changed("translation", x)[n], expected)
        seen.add((down, across))
    assert {down for down, _ in seen} == {-1, 0, 1}
    assert {across for _, across in seen} == {-2, -1, 0, 1, 2}


def test_cutout_blanks_half_a_side():
    x, sizes = images(height=8, width=6), set()
    for n, image in enumerate(x.numpy()):
        down, across = int(draws(5)[n] * 9), int(draws(6)[n] * 6)  # 4 is even, 3 is odd
        expected = image.copy()
        expected[:, max(0, down - 2) : down + 2, max(0, across - 1) : across + 2] = 0
        np.testing.assert_array_equal(changed("cutout", x)[n], expected)
        sizes.add(int((expected == 0).all(0).sum()))
    assert max(sizes) == 12
    assert min(sizes) < 12  # partly outside


def test_operations_follow_each_other_and_leave_each_others_draws_alone():
    x = images()
    one_by_one = x
    for op in ("brightness", "saturation", "contrast", "translation", "cutout"):
        one_by_one = diffaugment(one_by_one, KEYS, PURPOSE, ops=[op])
    assert torch.equal(diffaugment(x, KEYS, PURPOSE, ops=OPS[::-1]), one_by_one)
    assert torch.equal(diffaugment(x, KEYS, PURPOSE, ops=[]), x)


def test_policy_can_be_differentiated_twice():
    x = images(3, 4, 4)[:2].double().requires_grad_()
    for op in OPS:

        def loss(x, ops=(op,)):
            return torch.tanh(diffaugment(x, KEYS[:2], PURPOSE, ops=ops)).sum((1, 2, 3))

        assert torch.autograd.gradcheck(loss, (x,), fast_mode=True)
        assert torch.autograd.gradgradcheck(loss, (x,), fast_mode=True)
