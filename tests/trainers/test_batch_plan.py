from types import SimpleNamespace

import pytest

from trainers.batch_plan import give_whole_steps, grad_accum, in_steps, plan_run

UNITS = ("tokens", "samples", "images")
NOTHING = dict.fromkeys(
    [f"{what}_{unit}" for what in ("batch", "max") for unit in UNITS] + ["max_steps", "micro_batch"]
)


def plan(world_size=1, datamodule=None, **chosen):
    datamodule = {"sequence_length": 64} if datamodule is None else datamodule
    return plan_run(NOTHING | {"datamodule": datamodule} | chosen, world_size=world_size)


def test_units_lead_to_the_same_plan():
    by_tokens = plan(batch_tokens=768, max_tokens=7680 + 700)
    by_samples = plan(batch_samples=12, max_samples=120 + 11)
    by_steps = plan(batch_samples=12, max_steps=10)
    assert by_tokens == by_samples == by_steps
    assert (by_steps.batch_samples, by_steps.max_samples, by_steps.max_steps) == (12, 120, 10)


def test_images_are_samples_of_a_datamodule_of_images():
    images = {"resolution": 32}
    by_images = plan(datamodule=images, batch_images=16, max_images=165)
    assert (by_images.batch_samples, by_images.max_samples) == (16, 160)
    assert (by_images.unit, by_images.tokens_per_sample) == ("images", 1)
    by_samples = plan(datamodule=images, batch_samples=16, max_steps=10)
    assert by_samples == by_images
    with pytest.raises(ValueError, match=r"batch_images=16 -> .* are no images -> use batch_sam"):
        plan(batch_images=16, max_steps=1)
    with pytest.raises(ValueError, match=r"max_images=16 -> .* are no images -> use max_samples"):
        plan(batch_samples=16, max_images=16)


def test_cadence_in_images_goes_first_and_is_rounded_up():
    assert in_steps({"every_steps": 7, "every_images": None}, "every", 16) == 7
    assert in_steps({"every_steps": 7, "every_images": 33}, "every", 16) == 3
    assert in_steps({"every_steps": None, "every_images": None}, "every", 16) is None


def test_datamodule_says_how_many_tokens_a_sample_has():
    groups = plan(datamodule={"group_tokens": 512}, batch_tokens=2048, max_steps=1)
    assert (groups.batch_samples, groups.tokens_per_sample) == (4, 512)
    pairs = plan(datamodule={"group_tokens": None}, batch_samples=4, max_steps=1)
    assert (pairs.batch_samples, pairs.tokens_per_sample) == (4, 1)


@pytest.mark.parametrize(
    ("world_size", "micro_batch", "accum", "share"),
    [(1, None, 1, 48), (1, 12, 4, 12), (4, None, 1, 12), (4, 3, 4, 3), (48, 1, 1, 1)],
)
def test_accumulation_fills_the_batch(world_size, micro_batch, accum, share):
    chosen = plan(world_size, batch_samples=48, max_steps=1, micro_batch=micro_batch)
    assert (chosen.grad_accum, chosen.micro_batch) == (accum, share)
    assert chosen.grad_accum * chosen.micro_batch * world_size == 48


def test_every_split_is_whole_or_refused():
    for size in range(1, 25):
        for world_size in range(1, 9):
            for micro_batch in range(1, 9):
                try:
                    accum = grad_accum(size, micro_batch, world_size)
                except ValueError:
                    assert size % (world_size * micro_batch)
                else:
                    assert accum * micro_batch * world_size == size


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"batch_tokens": 100, "max_steps": 1}, r"batch_tokens=100 -> .* batch_tokens=128"),
        ({"batch_samples": 4}, "nothing -> the run's length"),
        ({"batch_samples": 4, "max_steps": 1, "max_tokens": 1}, "max_tokens=1, max_steps=1 ->"),
        (
            {"batch_samples": 4, "max_samples": 3},
            "max_samples=3 -> .* less than one optimizer step",
        ),
        ({"batch_samples": 2.5, "max_steps": 1}, "batch_samples=2.5 -> .* whole number"),
        ({"batch_samples": 4, "max_steps": 1, "micro_batch": 0}, "micro_batch=0 -> "),
        ({"batch_tokens": 64, "max_steps": 1, "datamodule": {}}, "batch_tokens=64 -> .* no fixed"),
        ({"batch_samples": 4, "max_tokens": 64, "datamodule": {}}, "max_tokens=64 -> .* no fixed"),
    ],
)
def test_impossible_plan_is_refused(chosen, message):
    with pytest.raises(ValueError, match=message):
        plan(**chosen)


def test_micro_batches_of_a_step_come_as_a_list():
    datamodule = SimpleNamespace(train_dataloader=lambda: range(6))
    assert give_whole_steps(SimpleNamespace(automatic_optimization=True), datamodule, 2) == 2
    assert list(datamodule.train_dataloader()) == [0, 1, 2, 3, 4, 5]
    assert give_whole_steps(SimpleNamespace(automatic_optimization=False), datamodule, 2) == 1
    loader = datamodule.train_dataloader()
    assert len(loader) == 3
    assert list(loader) == [[0, 1], [2, 3], [4, 5]]
