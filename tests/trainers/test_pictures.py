"""Pictures beside training, with stand-ins for trainer and module; order by events, not by time."""

import threading
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from trainers.callbacks.pictures import Pictures
from trainers.metrics import StampedLogger

BATCH = 8
VAL_EVERY_STEPS = 7


class Recorder(StampedLogger):
    """Keeps which pictures it was given, and on which thread."""

    def __init__(self):
        super().__init__()
        self.pictures, self.threads = [], set()

    @property
    def name(self):
        return "recorder"

    def log_metrics(self, metrics, step=None):
        """Nothing."""

    def log_pictures(self, pictures, num_images):
        self.threads.add(threading.current_thread())
        assert all(path.exists() for path in pictures.values())
        self.pictures.append((num_images, [*pictures]))


class Module:
    """Draws the number of the step that its picture was begun at; waits for `gate` to do so.

    `broken` are names of pictures that cannot be drawn.
    """

    def __init__(self):
        self.begun, self.threads = [], set()
        self.gate = threading.Event()
        self.gate.set()
        self.broken = ()

    def pictures(self):
        step, self.threads = self.trainer.global_step, self.threads | {threading.current_thread()}
        self.begun.append(step)

        def draw(name):
            assert self.gate.wait(timeout=20)
            if name in self.broken:
                raise ZeroDivisionError("of its own")
            return np.full((4, 6, 3), step, np.uint8)

        return {name: partial(draw, name) for name in ("grid", "classes")}


@pytest.fixture
def start(tmp_path):
    """Make a run: its callback, trainer, module and logger."""

    def start_run(every_steps=None, step=0, module=None, accum=1, rank=0):
        logger, module = Recorder(), module or Module()
        trainer = SimpleNamespace(
            global_step=step,
            is_global_zero=rank == 0,
            accumulate_grad_batches=accum,
            val_check_interval=VAL_EVERY_STEPS * accum,
            loggers=[logger],
            state=SimpleNamespace(fn="fit"),
        )
        module.trainer = trainer
        samples = tmp_path / "samples"
        callback = Pictures(samples, every_steps=every_steps, batch_samples=BATCH)
        callback.on_train_start(trainer, module)
        return SimpleNamespace(callback=callback, trainer=trainer, module=module, logger=logger)

    return start_run


def take_steps(run, count):
    for _ in range(count):
        accum = run.trainer.accumulate_grad_batches
        for micro_batch in range(accum):
            run.trainer.global_step += micro_batch == accum - 1
            index = (run.trainer.global_step - (micro_batch == accum - 1)) * accum + micro_batch
            run.callback.on_train_batch_end(run.trainer, run.module, None, None, index)


def finish(run):
    run.callback.on_train_end(run.trainer, run.module)


def folders(tmp_path):
    return sorted(path.name for path in (tmp_path / "samples").iterdir())


@pytest.mark.parametrize("accum", [1, 3])
def test_pictures_come_every_so_many_steps(start, tmp_path, accum):
    run = start(every_steps=3, accum=accum)
    take_steps(run, 10)
    finish(run)
    assert run.module.begun == [3, 6, 9, 10]
    assert folders(tmp_path) == [f"images-{8 * step:09d}" for step in (3, 6, 9, 10)]
    picture = np.asarray(Image.open(tmp_path / "samples" / "images-000000048" / "grid.png"))
    assert np.array_equal(picture, np.full((4, 6, 3), 6, np.uint8))


def test_pictures_come_after_validations_and_at_the_end_once_a_step(start):
    run = start(every_steps=2)
    take_steps(run, 2)
    run.callback.on_validation_end(run.trainer, run.module)
    take_steps(run, 1)
    run.callback.on_validation_end(run.trainer, run.module)
    run.trainer.state.fn = "validate"
    take_steps(run, 2)
    run.callback.on_validation_end(run.trainer, run.module)
    finish(run)
    assert run.module.begun == [2, 3, 4, 5]
    assert run.logger.pictures == [(8 * step, ["grid", "classes"]) for step in (2, 3, 4, 5)]
    main = {threading.current_thread()}
    assert run.logger.threads == run.module.threads == main


def test_resumed_run_draws_nothing_again_and_what_a_crash_took(start, tmp_path):
    run = start(every_steps=2)
    take_steps(run, 4)
    run.callback.on_exception(run.trainer, run.module, KeyboardInterrupt())
    again = start(every_steps=2, step=4)
    take_steps(again, 2)
    finish(again)
    assert again.module.begun == [6]
    (tmp_path / "samples" / "images-000000048").rename(tmp_path / "samples" / ".images-48.partial")
    crashed = start(every_steps=2, step=6)
    assert crashed.module.begun == [6]
    # Before `on_train_start` is over: the data's workers are forked next.
    assert crashed.logger.pictures == [(48, ["grid", "classes"])]
    assert folders(tmp_path) == [f"images-{8 * step:09d}" for step in (2, 4, 6)]
    finish(crashed)


@pytest.mark.parametrize("accum", [1, 3])
def test_resumed_run_draws_what_a_crash_took_of_a_validation(start, accum):
    for step, begun in ((VAL_EVERY_STEPS, [VAL_EVERY_STEPS]), (VAL_EVERY_STEPS - 1, []), (0, [])):
        run = start(step=step, accum=accum)
        assert run.module.begun == begun
        run.callback.on_exception(run.trainer, run.module, KeyboardInterrupt())


def test_training_goes_on_while_pictures_are_drawn_and_waits_for_the_third_of_them(start):
    run = start(every_steps=1)
    run.module.gate.clear()
    take_steps(run, 2)  # comes back, although nothing is drawn
    assert run.module.begun == [1, 2]
    assert not run.logger.pictures
    third = threading.Thread(target=take_steps, args=[run, 1])
    third.start()
    third.join(timeout=0.2)
    assert third.is_alive()  # for two are pending
    assert run.module.begun == [1, 2]  # and no further copy of the generator is taken
    run.module.gate.set()
    third.join(timeout=20)
    assert run.module.begun == [1, 2, 3]
    finish(run)
    assert [num_images for num_images, _ in run.logger.pictures] == [8, 16, 24]


@pytest.mark.parametrize("how", ["ends", "fails"])
def test_run_ends_with_its_pictures_and_without_their_thread(start, tmp_path, how):
    run = start(every_steps=2)
    run.module.gate.clear()
    take_steps(run, 2)
    opener = threading.Timer(0.2, run.module.gate.set)
    opener.start()
    if how == "ends":
        finish(run)
    else:
        run.callback.on_exception(run.trainer, run.module, RuntimeError())
    assert run.module.gate.is_set()
    assert folders(tmp_path) == ["images-000000016"]
    assert [num_images for num_images, _ in run.logger.pictures] == [16]
    opener.join()
    assert not [t for t in threading.enumerate() if t.name.startswith("pictures")]


def test_picture_that_cannot_be_drawn_is_a_warning_and_leaves_the_others(start, tmp_path):
    run = start(every_steps=1)
    run.module.broken = ("grid",)
    take_steps(run, 1)
    reason = "8 images: grid could not .* goes on: ZeroDivisionError: of its own"
    with pytest.warns(UserWarning, match=reason):
        run.callback._finish_oldest(run.trainer)
    assert [file.name for file in (tmp_path / "samples").glob("*/*")] == ["classes.png"]
    run.module.broken = ("grid", "classes")
    take_steps(run, 1)
    with pytest.warns(UserWarning, match="16 images: ") as warned:
        run.callback._finish_oldest(run.trainer)
    assert len(warned) == 2
    assert folders(tmp_path) == ["images-000000008"]  # and nothing half done
    run.module.broken = ()
    take_steps(run, 1)
    finish(run)
    assert run.logger.pictures == [(8, ["classes"]), (24, ["grid", "classes"])]


def test_folder_that_cannot_be_written_is_a_warning(start, tmp_path):
    run = start(every_steps=1)
    (tmp_path / "samples").write_text("no folder")
    take_steps(run, 1)
    with pytest.warns(UserWarning, match="8 images: all could not be .*: (NotADir|FileExists)"):
        run.callback._finish_oldest(run.trainer)
    finish(run)
    assert not run.logger.pictures


def test_other_ranks_and_modules_without_pictures_do_nothing(start, tmp_path):
    other = start(every_steps=1, rank=1)
    take_steps(other, 2)
    finish(other)
    assert not other.module.begun
    without = start(every_steps=1, module=SimpleNamespace())
    take_steps(without, 2)
    finish(without)
    assert not (tmp_path / "samples").exists()


def test_wandb_is_given_pictures_that_say_when_they_are_from(tmp_path, monkeypatch):
    from trainers.callbacks import wandb

    rows = []
    client = SimpleNamespace(
        log=lambda row, step: rows.append((step, row)), define_metric=lambda *args, **options: None
    )
    monkeypatch.setattr(wandb.wandb, "init", lambda **settings: client)
    logger = wandb.WandbLogger(
        tmp_path, run_config={}, project="p", entity=None, group=None, tags=[], mode="offline"
    )
    logger.stamp = lambda: {"step": 7, "samples": 56}
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "grid.png")
    logger.log_pictures({"grid": tmp_path / "grid.png"}, 40)
    ((step, row),) = rows
    assert (step, row["samples"]) == (7, 56)
    assert row["pictures/grid"]._caption == "after 40 images"
