"""A GAN that is stopped or killed ends with the bits of one that is not."""

import random
import shutil
from pathlib import Path

import pytest

from launch import runtime
from launch.run_directory import RunDirectory
from modules.gan import GAN
from tests.launch.gan_runs import STATEFUL, differing, rows, weights
from trainers.callbacks.preemption import Preemption
from trainers.strategies.whole_state import WholeState

STEPS, STOP = 24, 10
"""The stop is between two penalties, two changes of the augmentation and two validations."""


@pytest.fixture(scope="module")
def settings(gan_settings, tmp_path_factory):
    return [
        *gan_settings,
        *STATEFUL,
        f"runs_dir={tmp_path_factory.mktemp('runs')}",
        "batch_images=8",
        f"max_steps={STEPS}",
        "trainer.val_every_images=72",
        "checkpoints.every_images=null",
    ]


@pytest.fixture(scope="module")
def whole(settings, train):
    return train(*settings, "run.name=whole")


@pytest.fixture(scope="module")
def stopped(settings, train):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Preemption, "_agree", lambda self, trainer: trainer.global_step == STOP)
        return train(*settings, "run.name=stopped", code=runtime.PREEMPTED)


@pytest.fixture
def resume(stopped, settings, train, tmp_path):
    """Continue a copy of the stopped run."""

    def copy_and_continue(*overrides):
        shutil.copytree(stopped.path, tmp_path / stopped.path.name)
        return train(*settings, f"runs_dir={tmp_path}", "run.name=stopped", *overrides)

    return copy_and_continue


def test_run_has_a_state_in_all_that_could_be_lost(whole, stopped):
    assert 0 < weights(stopped)["augmentation.probability"] < 1
    assert weights(stopped)["augmentation.sign_count"] == 8 * (STOP % 4)
    assert weights(whole)["augmentation.probability"] > weights(stopped)["augmentation.probability"]
    steps = {
        key: [r["step"] for r in rows(whole) if key in r]
        for key in (
            "train/penalty",
            "train/generator_loss",
            "train/lr/generator",
            "val/frechet_distance",
        )
    }
    assert steps["train/penalty"] == [*range(1, STEPS + 1, 3)]
    assert steps["train/generator_loss"] == [*range(2, STEPS + 1, 2)]
    assert steps["train/lr/generator"] == steps["train/generator_loss"]
    assert steps["val/frechet_distance"] == [9, 18, 24]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stopped_gan_ends_with_the_same_bits(num_workers, whole, resume, capfd):
    assert not differing(whole, resume(f"datamodule.num_workers={num_workers}"))
    printed = capfd.readouterr().out
    begins = f"continues from step-{STOP:08d} (saved by single on 1 rank(s)), up to {STEPS} steps"
    assert f"stopped: running: {begins}" in printed


@pytest.mark.parametrize(
    ("lost", "also"),
    [
        ("ema.", {"rows"}),  # scores
        ("augmentation.", {"generator.dense.weight", "discriminator.dense.weight"}),
        ("generator.norm.running_", {"ema.network.norm.running_mean"}),
    ],
)
def test_gan_that_lost_a_state_is_another(lost, also, whole, resume, monkeypatch):
    def forget(self, checkpoint):
        initial = self.state_dict().items()
        found = {name: value for name, value in initial if name.startswith(lost)}
        assert found
        checkpoint["state_dict"] |= found

    monkeypatch.setattr(GAN, "on_load_checkpoint", forget)
    found = differing(whole, resume())
    assert also < found
    assert lost == "augmentation." or not {n for n in found if n.startswith("discriminator.")}


def test_gan_that_lost_its_optimizers_is_another(whole, resume, monkeypatch):
    monkeypatch.setattr(WholeState, "load_optimizer_state_dict", lambda *args: None)
    assert "generator.dense.weight" in differing(whole, resume())


@pytest.mark.slow  # a GPT that is killed is in every day's tests
def test_killed_gan_ends_with_the_same_bits(settings, train, start, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    long = [*settings, f"runs_dir={tmp_path}", "max_steps=40", "checkpoints.every_steps=5"]
    whole = train(*long, "run.name=whole")
    long += ["run.name=killed", "+trainer.callbacks.hold={_target_: tests.launch.gan_runs.Hold}"]
    long += ["+trainer.callbacks.hold.step=30"]
    step = random.randint(6, 25)
    print(f"killed after step {step}")
    process = start(*long, "datamodule.num_workers=2")
    start.wait(process, tmp_path / "killed", step)
    process.kill()
    process.wait()
    assert RunDirectory(tmp_path / "killed").status["state"] == "running"
    assert not differing(whole, train(*long))
