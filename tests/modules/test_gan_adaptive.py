import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation

from modules.gan_adaptive import GROUPS, adaptive
from modules.keyed_draws import normal, uniform

PURPOSE = 3
KEYS = torch.arange(24) * 7919
GEOMETRY = [*GROUPS["blit"], *GROUPS["geometry"]]
OPS = [*GEOMETRY, *GROUPS["color"]]
# Places of the draws: a rotation has two, before and behind the anisotropic scale.
STAGES = [*GEOMETRY[:6], "second_rotation", GEOMETRY[6], *GROUPS["color"]]


def images(channels=3, height=8, width=8, count=24):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, channels, height, width, generator=generator) * 2 - 1


def changed(ops, x, probability=1.0, keys=KEYS):
    return adaptive(x, keys, PURPOSE, probability=torch.tensor(probability), ops=ops)


def uniforms(stage):
    return uniform(KEYS, PURPOSE, 13, 3)[:, STAGES.index(stage), 1:].double().numpy()


def normals(stage):
    return normal(KEYS, PURPOSE, 13, 2)[:, STAGES.index(stage)].double().numpy()


def turn(angle):
    """Counter-clockwise as seen, of (x, y) where y points down."""
    return np.array(
        [[np.cos(angle), np.sin(angle), 0], [-np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    )


def shift(across, down):
    return np.array([[1, 0, across], [0, 1, down], [0, 0, 1.0]])


def forward_maps(stage, n, height, width):
    """Where the paper's operations take a point, in pixels from the centre."""
    u, z = uniforms(stage)[n], normals(stage)[n]
    factor = 2 ** (0.2 * z[0])
    return {
        "flip": lambda: np.diag([1.0 - 2 * int(2 * u[0]), 1, 1]),
        "rotate90": lambda: turn(int(4 * u[0]) * np.pi / 2),
        "integer_translation": lambda: shift(
            np.round((2 * u[0] - 1) * width / 8), np.round((2 * u[1] - 1) * height / 8)
        ),
        "scale": lambda: np.diag([factor, factor, 1]),
        "rotation": lambda: turn((2 * u[0] - 1) * np.pi),
        "second_rotation": lambda: turn((2 * u[0] - 1) * np.pi),
        "anisotropic_scale": lambda: np.diag([factor, 1 / factor, 1]),
        "fractional_translation": lambda: shift(z[0] * width / 8, z[1] * height / 8),
    }[stage]()


def by_scipy(image, forward):
    """Move an image [C, H, W] by scipy, which counts rows first and from the corner."""
    matrix = np.linalg.inv(forward)[[1, 0, 2]][:, [1, 0, 2]]
    centre = (np.array(image.shape[1:]) - 1) / 2
    offset = matrix[:2, 2] + centre - matrix[:2, :2] @ centre
    return np.stack(
        [
            ndimage.affine_transform(plane, matrix[:2, :2], offset, order=1, mode="mirror")
            for plane in image
        ]
    )


@pytest.mark.parametrize("op", [*GEOMETRY, "all"])
def test_geometry_moves_images_like_scipy(op):
    x = images(2, 8, 11)
    ops = GEOMETRY if op == "all" else [op]
    stages = [stage for stage in STAGES[:8] if stage.removeprefix("second_") in ops]
    for n, image in enumerate(changed(ops, x).numpy()):
        forward = np.eye(3)
        for stage in stages:
            forward = forward_maps(stage, n, 8, 11) @ forward
        np.testing.assert_allclose(image, by_scipy(x[n].double().numpy(), forward), atol=5e-5)


def test_blits_are_exact():
    x = images()
    for n, image in enumerate(x):
        flipped = image.flip(2) if uniforms("flip")[n][0] >= 0.5 else image
        assert torch.equal(changed(["flip"], x)[n], flipped)
        turns = int(4 * uniforms("rotate90")[n][0])
        assert torch.equal(changed(["rotate90"], x)[n], image.rot90(turns, (1, 2)))
        across, down = np.round(2 * uniforms("integer_translation")[n] - 1).astype(int)
        padded = np.pad(image.numpy(), ((0, 0), (1, 1), (1, 1)), mode="reflect")
        expected = padded[:, 1 - down : 9 - down, 1 - across : 9 - across]
        assert np.array_equal(changed(["integer_translation"], x)[n].numpy(), expected)


def recolored(op, n, image):
    """Of [3, H, W], or one channel as three equal ones."""
    u, z = uniforms(op)[n], normals(op)[n]
    axis, grey = np.ones(3) / np.sqrt(3), image.mean(0)
    if op == "brightness":
        return image + 0.2 * z[0]
    if op == "contrast":
        return image * 2 ** (0.5 * z[0])
    if op == "luma_flip":
        return image - 2 * grey if u[0] >= 0.5 else image
    if op == "hue":
        turned = Rotation.from_rotvec((2 * u[0] - 1) * np.pi * axis).as_matrix()
        return np.einsum("ij,jhw->ihw", turned, image)
    return grey + (image - grey) * 2 ** z[0]


@pytest.mark.parametrize("op", [*GROUPS["color"], "all"])
@pytest.mark.parametrize("channels", [1, 3])
def test_colors_are_those_of_the_paper(op, channels):
    ops = GROUPS["color"] if op == "all" else (op,)
    if channels == 1:
        ops = [op for op in ops if op not in ("hue", "saturation")]
    x = images(channels)
    for n, image in enumerate(changed(ops, x).numpy()):
        expected = x[n].double().expand(3, -1, -1).numpy()
        for each in ops:
            expected = recolored(each, n, expected)
        np.testing.assert_allclose(image, expected[:channels], atol=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_operation_changes_the_share_of_images_that_it_should(op):
    keys = torch.arange(3000)
    x = images(height=4, width=16).repeat(125, 1, 1, 1)
    assert torch.equal(changed(OPS, x, 0.0, keys), x)
    share_where_on = {"flip": 1 / 2, "luma_flip": 1 / 2, "rotate90": 3 / 4}
    # Rounds to (0, 0): |x| < 1/4 of the range across, and all of it down.
    share_where_on["integer_translation"] = 3 / 4
    for probability in (0.3, 1.0):
        is_changed = (changed([op], x, probability, keys) != x).any(-1).any(-1).any(-1)
        expected = probability * share_where_on.get(op, 1)
        assert is_changed.float().mean().item() == pytest.approx(expected, abs=0.03)


def test_operations_leave_each_others_draws_alone():
    x = images()
    both = changed(["brightness", "flip"], x, 0.5)
    assert torch.equal(changed(["brightness"], changed(["flip"], x, 0.5), 0.5), both)
    assert not torch.equal(both, x)


@pytest.mark.parametrize("ops", [GEOMETRY, GROUPS["color"]])
def test_operations_can_be_differentiated_twice(ops):
    x = images(3, 4, 4, count=2).double().requires_grad_()

    def loss(x):
        return torch.tanh(changed(ops, x, keys=KEYS[:2])).sum((1, 2, 3))

    assert torch.autograd.gradcheck(loss, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, (x,), fast_mode=True)
