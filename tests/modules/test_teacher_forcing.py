import pytest
import torch

from modules.teacher_forcing import TeacherForcing


def make(start=1.0, end=0.0, decay_samples=None, is_recurrent=True, seed=1):
    return TeacherForcing(
        start=start,
        end=end,
        decay_samples=decay_samples,
        is_recurrent=is_recurrent,
        length=50,
        plan={"max_samples": 1000},
        seed=seed,
    )


def test_share_goes_in_a_line_to_its_end():
    shares = [make(start=1.0, end=0.2).share(samples) for samples in (0, 250, 1000, 2000)]
    assert shares == pytest.approx([1.0, 0.8, 0.2, 0.2])
    assert make(decay_samples=100).share(50) == pytest.approx(0.5)


def test_coins_fall_as_often_as_the_share_says():
    forcing = make(start=0.7, end=0.7)
    coins = torch.stack([forcing.coins(step, 50) for step in range(100)])
    assert coins.float().mean().item() == pytest.approx(0.7, abs=0.03)
    assert not (coins == coins[0]).all()


def test_coins_depend_on_seed_and_step_alone():
    coins = make(start=0.5).coins(200, 40)
    torch.manual_seed(7)
    assert torch.equal(coins, make(start=0.5).coins(200, 40))
    assert not torch.equal(coins, make(start=0.5, seed=2).coins(200, 40))
    assert not torch.equal(coins, make(start=0.5).coins(201, 40))


def test_all_fed_needs_no_coins():
    assert make(start=1.0, end=1.0).coins(500, 10) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay_samples": 0}, r"decay_samples=0 -> .* 1 or more"),
        ({"start": 1.5}, r"teacher_forcing\.start=1\.5 -> .* 0 to 1"),
        ({"end": 0.5, "is_recurrent": False}, r"teacher_forcing\.end=0\.5 -> a Transformer"),
    ],
)
def test_impossible_share_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)
