import math

import pytest

from modules.ramps import Ramp


def ramp(start=2.0, end=1.0, images=None, shape="linear"):
    setting = {"start": start, "end": end, "images": images, "shape": shape}
    return Ramp(setting, "module.r1", 1000)


def test_number_stays():
    assert [Ramp(3, "module.r1", 1000)(images) for images in (0, 500, 5000)] == [3, 3, 3]


def test_linear_ramp_goes_in_a_line_and_stays_at_its_end():
    values = [ramp(images=400)(images) for images in (0, 100, 400, 1000)]
    assert values == pytest.approx([2, 1.75, 1, 1])
    assert ramp()(500) == pytest.approx(1.5)  # over the whole run


def test_cosine_ramp_is_that_of_the_paper():
    for images in (0, 100, 333, 1000):
        expected = 0.3 + (0 - 0.3) * (1 + math.cos(math.pi * images / 1000)) / 2
        assert ramp(0.0, 0.3, shape="cosine")(images) == pytest.approx(expected, abs=1e-12)
    assert ramp(0.0, 0.3, 100, "cosine")(700) == pytest.approx(0.3)


def test_only_a_ramp_that_never_leaves_zero_is_zero():
    assert Ramp(0, "module.r1", 1000).is_zero
    assert ramp(0.0, 0.0).is_zero
    assert not ramp(0.0, 0.1).is_zero
    assert not ramp(0.1, 0.0).is_zero


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("much", r"module\.p=much -> neither .* -> set a number"),
        (None, r"module\.p=None -> neither"),
        (1.5, r"module\.p=1\.5 -> 1\.5 is out .* 0 to 1"),
        (math.nan, r"module\.p=nan -> nan is out"),
        ({"start": 0, "end": 1}, r"module\.p=.* -> a ramp has other keys -> give start"),
        ({"start": 0, "end": 1, "images": 9, "shape": "steep"}, r"p\.shape=steep -> unknown"),
        ({"start": 0, "end": 1, "images": 0, "shape": "linear"}, r"p\.images=0 -> .* 1 or more"),
        ({"start": 0, "end": 2, "images": 9, "shape": "linear"}, r"p=.* -> 2 is out"),
    ],
)
def test_impossible_setting_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        Ramp(setting, "module.p", 1000, bounds=(0, 1))
