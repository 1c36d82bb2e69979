"""A GAN whose loss is no number at a step, and rounds that are not made as they must be."""

from contextlib import nullcontext

import pytest
from lightning.pytorch.core.optimizer import LightningOptimizer

from modules import gan_losses
from modules.gan import GAN
from modules.gan_augmentation import Augmentation
from modules.gan_dcgan import DCGANDiscriminator
from tests.launch.gan_runs import STATEFUL, differing, rows, weights
from trainers.checkpoint import list_checkpoints, load_weights
from trainers.strategies.replicated import Single

STEP, STEPS = 8, 10
"""At which a checkpoint is due, both parts are updated, and no penalty is."""
SKIP = "trainer.guard.nonfinite=skip"
SPOILED = {
    "discriminator": (gan_losses, "discriminator_loss"),
    "generator": (gan_losses, "generator_loss"),
    "logits": (DCGANDiscriminator, "forward"),
}


@pytest.fixture
def settings(gan_run):
    return [
        *gan_run,
        *STATEFUL,
        "batch_images=8",
        f"max_steps={STEPS}",
        "trainer.log_every_steps=3",  # what is judged is read back later
        "checkpoints.every_images=32",
    ]


@pytest.fixture
def spoil(monkeypatch):
    """Make what is named no number at `STEP`: the loss of a part, or all logits."""

    def spoil_one(name):
        owner, function = SPOILED[name]
        original, begun = getattr(owner, function), []

        def spoiled(*args):
            value = original(*args)
            return value * float("nan") if begun[-1] == STEP else value

        def note(module, *args):
            begun.append(module.global_step + 1)

        monkeypatch.setattr(GAN, "on_train_batch_start", note)
        monkeypatch.setattr(owner, function, spoiled)

    return spoil_one


def are_finite(tensors):
    return all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.parametrize("name", ["discriminator", "generator"])
def test_loss_that_is_no_number_stops_before_it_is_saved(name, settings, train, spoil, tmp_path):
    spoil(name)
    with pytest.raises(FloatingPointError) as error:
        train(*settings)
    message = str(error.value)
    what = f"trainer.guard.nonfinite=stop -> the loss of part `{name}` on rank 0 is not finite at "
    assert message.startswith(f"{what}step {STEP}: the run diverged -> ")
    assert "continue it from its last checkpoint (step-00000004) with" in message
    (saved,) = list_checkpoints(tmp_path / "runs" / "digits" / "checkpoints")
    assert saved.name == "step-00000004"
    assert are_finite(load_weights(saved))


@pytest.mark.parametrize("name", SPOILED)
def test_step_that_is_no_number_is_as_if_left_out(name, settings, train, spoil, monkeypatch):
    left_out = {"discriminator", "generator"} if name == "logits" else {name}
    with monkeypatch.context() as patched:
        leave_out(left_out, sees_signs=name != "logits", patch=patched)
        expected = train(*settings, "run.name=left_out")
    spoil(name)
    run = train(*settings, SKIP)
    assert run.summary["step"] == STEPS
    assert rows(run)[-2]["train/skipped_steps"] == len(left_out)
    assert are_finite(weights(run))
    assert not differing(run, expected) - {"rows"}


def leave_out(parts, *, sees_signs, patch):
    """At `STEP` step no part of these, and show augmentation the signs of logits or not."""
    step_part, observe = Single.step_part, Augmentation.observe
    steps = []

    def step_others(strategy, part, optimizer):
        steps.append(strategy.module.global_step + 1)
        if steps[-1] != STEP or part not in parts:
            step_part(strategy, part, optimizer)

    def observe_others(*args):
        if steps[-1] != STEP or sees_signs:
            observe(*args)

    patch.setattr(Single, "step_part", step_others)
    patch.setattr(Augmentation, "observe", observe_others)


def test_signs_that_are_left_out_make_a_difference(settings, train, monkeypatch):
    one = train(*settings, "run.name=one")
    leave_out((), sees_signs=False, patch=monkeypatch)
    assert "generator.dense.weight" in differing(one, train(*settings, "run.name=other"))


def test_loss_that_reaches_into_the_other_part_is_refused(settings, train, monkeypatch, tmp_path):
    freeze = GAN.phase

    def freeze_one(module, optimizer, *, is_last):
        is_first = optimizer is module.optimizers()[0]
        return freeze(module, optimizer, is_last=is_last) if is_first else nullcontext()

    monkeypatch.setattr(GAN, "phase", freeze_one)
    message = "manual_backward -> parameters of discriminator and generator require gradients"
    with pytest.raises(RuntimeError, match=message):
        train(*settings)
    assert not list_checkpoints(tmp_path / "runs" / "digits" / "checkpoints")


def test_gradients_that_are_kept_for_the_next_training_step_are_refused(
    settings, train, monkeypatch
):
    def keep_back(module, optimizer, *, is_last):
        return optimizer.toggle_model(sync_grad=False)

    monkeypatch.setattr(GAN, "phase", keep_back)
    monkeypatch.setattr(LightningOptimizer, "step", lambda optimizer: None)
    message = "training_step -> it differentiated discriminator without a step, and counts"
    with pytest.raises(RuntimeError, match=message):
        train(*settings)
