import numpy as np
import pytest
import torch
from scipy import ndimage

from modules.gan_transforms import product, recolor, warp


def homogeneous(linear, shift=(0, 0)):
    maps = torch.eye(3)
    maps[:2, :2], maps[:2, 2] = torch.tensor(linear), torch.tensor(shift)
    return maps


def by_scipy(image, maps):
    """Sample [C, H, W] by scipy, which counts rows first and from the corner."""
    matrix = maps.double().numpy()[[1, 0, 2]][:, [1, 0, 2]]  # of (y, x, 1)
    centre = (np.array(image.shape[1:]) - 1) / 2
    offset = matrix[:2, 2] + centre - matrix[:2, :2] @ centre
    sampled = [
        ndimage.affine_transform(plane, matrix[:2, :2], offset, order=1, mode="mirror")
        for plane in image.double().numpy()
    ]
    return torch.from_numpy(np.stack(sampled)).float()


@pytest.mark.parametrize("shape", [(2, 8, 8), (1, 7, 4)])
def test_warp_samples_like_scipy(shape):
    torch.manual_seed(0)
    images = torch.rand(6, *shape)
    maps = torch.stack(
        [
            homogeneous([[1.0, 0], [0, 1]], (0.25, -1.5)),
            homogeneous([[0.8, 0.6], [-0.6, 0.8]]),
            homogeneous([[2.0, 0.3], [0.1, 0.5]], (1.0, 3.3)),
            homogeneous([[0.5, 0], [0, 0.4]], (0.1, 0.2)),
            homogeneous([[1.0, 0], [0, 1]], (30.2, -41.7)),  # reflected more than once
            homogeneous([[5.0, 1], [-2, 4]]),
        ]
    )
    warped = warp(images, maps)
    for image, own, result in zip(images, maps, warped, strict=True):
        torch.testing.assert_close(result, by_scipy(image, own), rtol=0, atol=2e-5)
    assert (warped - images).abs().amax((1, 2, 3)).min() > 0.1  # nothing is left as it was


def test_warp_moves_whole_pixels_exactly():
    images = torch.randn(3, 2, 6, 6)
    maps = torch.stack(
        [
            homogeneous([[1.0, 0], [0, 1]]),
            homogeneous([[-1.0, 0], [0, 1]]),
            homogeneous([[0.0, -1], [1, 0]]),
        ]
    )
    same, flipped, turned = warp(images, maps)
    assert torch.equal(same, images[0])
    assert torch.equal(flipped, images[1].flip(2))
    assert torch.equal(turned, images[2].rot90(1, (1, 2)))


def test_recolor_is_a_matrix_for_each_pixel():
    images, maps = torch.randn(2, 3, 4, 5), torch.randn(2, 4, 4)
    colors = torch.cat([images, torch.ones(2, 1, 4, 5)], 1)
    expected = torch.einsum("bij,bjhw->bihw", maps[:, :3], colors)
    torch.testing.assert_close(recolor(images, maps), expected)


def test_product_is_not_rounded_by_autocast():
    left, right = torch.randn(2, 5, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(
            product(left, right), torch.bmm(left.double(), right.double()).float()
        )
        assert (left @ right).dtype == torch.bfloat16  # what it is for
