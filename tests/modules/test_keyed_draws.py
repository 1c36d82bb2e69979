import numpy as np
import pytest
import torch
from scipy import stats

from datamodules import order
from modules.keyed_draws import evaluation_keys, normal, uniform

KEYS = torch.tensor([0, 1, 2, -1, -(2**63), 2**63 - 1, 1234567890123456789])


def words(key, purpose, kind, count):
    """The bits by the functions of the data's order, in numpy's unsigned integers."""
    own = order.hash_key(key % 2**64, purpose, kind)
    return order.splitmix64(order.splitmix64(np.arange(count, dtype=np.uint64)) ^ own)


def test_uniform_has_the_bits_of_the_order_of_data():
    draws = uniform(KEYS, 5, 3, 4)
    assert draws.shape == (7, 3, 4)
    assert draws.dtype == torch.float32
    for key, row in zip(KEYS.tolist(), draws, strict=True):
        expected = (words(key, 5, 1, 12) >> np.uint64(40)).astype(np.float64) / 2**24
        assert row.flatten().tolist() == expected.tolist()


def test_normal_is_box_muller_of_the_same_bits():
    draws = normal(KEYS, 5, 7)  # an odd number leaves half a pair
    assert draws.shape == (7, 7)
    for key, row in zip(KEYS.tolist(), draws, strict=True):
        bits = words(key, 5, 2, 4)
        radius = np.sqrt(-2 * np.log(((bits >> np.uint64(32)) + np.uint64(1)) / 2**32))
        angle = 2 * np.pi * (bits & np.uint64(2**32 - 1)) / 2**32
        pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).ravel()[:7]
        np.testing.assert_allclose(row.numpy(), pairs, rtol=1e-6, atol=1e-7)


def test_draws_follow_their_distributions():
    keys = torch.arange(1000)
    uniforms, normals = uniform(keys, 1, 100).flatten(), normal(keys, 1, 100).flatten()
    assert uniforms.min() >= 0
    assert uniforms.max() < 1
    assert stats.kstest(uniforms.numpy(), "uniform").pvalue > 0.01
    assert stats.kstest(normals.numpy(), "norm").pvalue > 0.01
    assert stats.kstest(normals.numpy() * 1.02, "norm").pvalue < 0.01  # it would tell
    moments = [(normals**power).mean().item() for power in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.05)


def correlation(a, b):
    return abs(np.corrcoef(a.flatten().numpy(), b.flatten().numpy())[0, 1])


@pytest.mark.parametrize("draw", [uniform, normal])
def test_purposes_keys_and_places_are_independent(draw):
    keys = torch.arange(500)
    draws = draw(keys, 1, 100)
    others = {
        "purpose": draw(keys, 2, 100),
        "next key": draw(keys + 1, 1, 100),
        "far key": draw(keys ^ (1 << 40), 1, 100),
        "next place": draws.roll(1, 1),
        "second next place": draws.roll(2, 1),
    }
    for name, other in others.items():
        assert correlation(draws, other) < 4 / np.sqrt(draws.numel()), name
        # A pair of Box and Muller shares a radius, which would show in sizes.
        assert correlation(draws.abs(), other.abs()) < 4 / np.sqrt(draws.numel()), name
    assert correlation(draws, draw(keys, 1, 100)) > 0.999
    assert correlation(uniform(keys, 1, 100), normal(keys, 1, 100)) < 4 / np.sqrt(50_000)


@pytest.mark.parametrize("draw", [uniform, normal])
def test_draws_do_not_depend_on_the_batch(draw):
    keys, shuffled = torch.arange(37) * 987654321, torch.randperm(37)
    whole = draw(keys, 3, 5, 3)
    parts = [draw(part, 3, 5, 3) for part in keys.split([1, 20, 16])]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(draw(keys[shuffled], 3, 5, 3), whole[shuffled])
    assert torch.equal(draw(keys, 3, 9), whole.flatten(1)[:, :9])


def test_numbered_samples_have_keys_of_their_own():
    positions = torch.arange(100_000)
    keys = evaluation_keys(7, positions)
    assert keys.dtype == torch.int64
    assert len(keys.unique()) == len(keys)
    assert keys[41].item() % 2**64 == int(order.hash_key(7, 3, 41))
    assert torch.equal(evaluation_keys(7, positions[50:60]), keys[50:60])
    assert not (evaluation_keys(8, positions) == keys).any()


@pytest.mark.gpu
def test_draws_are_the_same_on_a_gpu():
    keys = torch.arange(1000) * 987654321
    assert torch.equal(uniform(keys.cuda(), 1, 100).cpu(), uniform(keys, 1, 100))
    there, here = normal(keys.cuda(), 1, 100).cpu(), normal(keys, 1, 100)
    assert (there != here).sum() <= 2
    torch.testing.assert_close(there, here, rtol=3e-7, atol=1e-7)
