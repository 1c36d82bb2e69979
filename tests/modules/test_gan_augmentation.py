import math

import pytest
import torch

from modules.gan_augmentation import Augmentation

CONTROL = {"target": 0.6, "speed_images": 1000, "interval_steps": 4}
RAMP = {"start": 0.0, "end": 0.4, "images": 200, "shape": "linear"}


def make(name="adaptive", ops=None, probability=CONTROL, channels=3):
    return Augmentation(
        name=name,
        ops=ops,
        probability=probability if name == "adaptive" else None,
        channels=channels,
        max_images=400,
    )


def batch(channels=3, count=10):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, channels, 8, 8, generator=generator) * 2 - 1
    return images, torch.arange(count) * 7919


@pytest.mark.parametrize("augmentation", [make("none"), make(probability=0), make(ops=[])])
def test_nothing_to_apply_gives_back_the_same_images(augmentation):
    images, keys = batch()
    assert not augmentation.is_active
    assert augmentation(images, keys, 1) is images


@pytest.mark.parametrize("name", ["diffaugment", "adaptive"])
def test_images_are_changed_alike_in_any_batch(name):
    (images, keys), augmentation = batch(), make(name, probability=0.5)
    whole, shuffled = augmentation(images, keys, 1), torch.randperm(10)
    parts = [
        augmentation(images[part], keys[part], 1) for part in torch.arange(10).split([1, 3, 6])
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-6)
    again = augmentation(images[shuffled], keys[shuffled], 1)
    torch.testing.assert_close(again, whole[shuffled], rtol=0, atol=1e-6)
    for other in (augmentation(images, keys, 2), augmentation(images, keys + 1, 1), images):
        assert (other - whole).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "ops"), [("diffaugment", ["contrast"]), ("diffaugment", None), ("adaptive", None)]
)
def test_low_precision_is_kept_and_computed_in_fp32(name, ops):
    (images, keys), augmentation = batch(), make(name, ops, probability=0.9)
    low = images.bfloat16()
    expected = augmentation(low.float(), keys, 1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augmentation(low, keys, 1), expected)


def test_groups_and_operations_are_chosen_by_name():
    assert make(ops=["blit"]).ops == {"flip", "rotate90", "integer_translation"}
    assert make(ops=["blit", "hue"]).ops == make(ops=["blit"]).ops | {"hue"}
    assert len(make().ops) == 12
    assert make(channels=1).ops == make().ops - {"hue", "saturation"}
    assert make("diffaugment", ["translation", "color"], channels=1).ops == {
        "translation",
        "brightness",
        "contrast",
    }


def step(augmentation, number, mean, count=10):
    """A step in which `count` real images have signs of some mean."""
    augmentation.observe(torch.tensor(mean * count), count)
    augmentation.adjust(number, 0)


def test_probability_rises_and_falls_by_the_images_observed():
    augmentation, seen = make(), []
    for number, mean in enumerate([0.9] * 8 + [0.2] * 4 + [1.0] * 3, 1):
        step(augmentation, number, mean)
        seen.append(augmentation.probability.item())
    expected = [0.0] * 3 + [0.04] * 4 + [0.08] * 4 + [0.04] * 4  # by 4 steps of 10 in 1000
    assert seen == pytest.approx(expected)


def test_mean_sign_of_the_whole_interval_decides():
    augmentation = make()
    for number, mean in enumerate([1.0, 0.3, 0.3, 0.6], 1):  # 0.55, although the first is above
        step(augmentation, number, mean)
    augmentation.probability.fill_(0.5)
    for number, mean in enumerate([1.0, 0.3, 0.3, 0.6], 5):
        step(augmentation, number, mean)
    assert augmentation.probability.item() == pytest.approx(0.46)


def test_probability_stays_within_its_bounds():
    augmentation = make(probability=CONTROL | {"speed_images": 1, "interval_steps": 1})
    for number, (mean, expected) in enumerate([(0.1, 0.0), (1.0, 1.0), (1.0, 1.0), (0.0, 0.0)], 1):
        step(augmentation, number, mean)
        assert augmentation.probability.item() == expected


@pytest.mark.parametrize("sign", [math.nan, math.inf])
def test_signs_that_are_none_change_nothing(sign):
    augmentation, plain = make(), make()
    augmentation.observe(torch.tensor(sign), 10)
    assert augmentation.sign_sum == augmentation.sign_count == 0
    for number in range(1, 5):
        augmentation.observe(torch.tensor(sign), 10)
        for each in (augmentation, plain):
            step(each, number, 0.9)
    assert torch.equal(augmentation.probability, plain.probability)
    assert plain.probability > 0
    for number in range(5, 9):
        augmentation.observe(torch.tensor(sign), 10)
        augmentation.adjust(number, 0)
    assert torch.equal(augmentation.probability, plain.probability)


def test_probability_follows_a_ramp():
    augmentation = make(probability=RAMP)
    assert augmentation.is_active
    seen = [augmentation.probability.item()]
    for number, images in enumerate((50, 200, 400), 1):
        augmentation.observe(torch.tensor(10.0), 10)
        augmentation.adjust(number, images)
        seen.append(augmentation.probability.item())
    assert seen == pytest.approx([0, 0.1, 0.4, 0.4])
    assert not augmentation.has_target


def test_state_goes_on_in_the_middle_of_an_interval():
    first, straight = make(), make()
    for number in range(1, 7):
        for each in (first, straight):
            step(each, number, 0.9)
    resumed = make()
    resumed.load_state_dict(first.state_dict())
    assert resumed.sign_count == 20
    for number in range(7, 9):
        for each in (resumed, straight):
            step(each, number, 0.9)
    assert torch.equal(resumed.probability, straight.probability)
    images, keys = batch()
    assert torch.equal(resumed(images, keys, 1), straight(images, keys, 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "ada"}, r"augmentation\.name=ada -> unknown -> choose one of none, diffaugment"),
        ({"name": "none", "ops": ["flip"]}, r"ops=\['flip'\] -> .*name=none .* null"),
        ({"ops": ["spin"]}, r"ops=\['spin'\] -> spin is unknown under adaptive -> .* blit, .*flip"),
        ({"name": "diffaugment", "ops": ["flip"]}, r"flip is unknown under diffaugment -> .*color"),
        ({"ops": ["hue"], "channels": 1}, r"hue changes nothing in images of one channel -> leave"),
        ({"probability": None}, r"probability=null -> .*adaptive needs one -> set a number"),
        ({"probability": 1.2}, r"augmentation\.probability=1\.2 -> .* 0 to 1"),
        ({"probability": RAMP | {"end": 2}}, r"probability=.* -> 2 is out of its bounds"),
        ({"probability": {"target": 0.6}}, r"probability=.* -> a controlled .* -> give target"),
        ({"probability": RAMP | CONTROL}, r"probability=.* -> a controlled .* -> give target"),
        ({"probability": CONTROL | {"target": 1}}, r"probability\.target=1 -> .* below 1"),
        ({"probability": CONTROL | {"interval_steps": 0}}, r"interval_steps=0 -> .* 1 or more"),
    ],
)
def test_impossible_setting_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


@pytest.mark.parametrize("name", ["none", "diffaugment"])
def test_probability_that_would_not_be_used_is_refused(name):
    with pytest.raises(ValueError, match=rf"probability=0\.5 -> .*name={name} has none -> set it"):
        Augmentation(name=name, ops=None, probability=0.5, channels=3, max_images=1)
