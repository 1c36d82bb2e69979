"""A rank that dies, hangs or diverges ends the run on all ranks, with its name as the reason."""

import gc

import pytest
from torch import equal

from launch import runtime
from trainers.checkpoint import load_weights
from trainers.compat import check
from trainers.metrics import read_metrics

# torch's elastic agent leaves the log files of its ranks to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)

TWO_RANKS = ["strategy=ddp", "trainer.devices=2", "checkpoints.every_steps=null"]

CALLBACKS = '''
import copy, os, signal, time
from lightning.pytorch import Callback

class AtStep(Callback):
    def __init__(self, step, rank=0):
        self.step, self.rank = step, rank

    def is_now(self, trainer):
        return (trainer.global_step, trainer.global_rank) == (self.step - 1, self.rank)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.is_now(trainer):
            self.act(trainer, pl_module)

class Kill(AtStep):
    def act(self, trainer, pl_module):
        os.kill(os.getpid(), signal.SIGKILL)

class Stop(AtStep):
    def act(self, trainer, pl_module):
        os.kill(os.getpid(), signal.SIGSTOP)

class Sleep(AtStep):
    def act(self, trainer, pl_module):
        time.sleep(1000)

class NaN(AtStep):
    def act(self, trainer, pl_module):
        hook = lambda network, inputs, loss: loss * float("nan")
        self.handle = pl_module.network.register_forward_hook(hook)

    def on_before_backward(self, trainer, pl_module, loss):
        if self.is_now(trainer):
            self.handle.remove()

class LeaveOut(AtStep):
    """Puts weights and optimizer back to where they were before a step."""

    def act(self, trainer, pl_module):
        states = pl_module.state_dict(), trainer.optimizers[0].state_dict()
        self.before = copy.deepcopy(states)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.step - 1:
            pl_module.load_state_dict(self.before[0])
            rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
            trainer.optimizers[0].load_state_dict(self.before[1])
            for group, rate in zip(trainer.optimizers[0].param_groups, rates):
                group["lr"] = rate  # the schedule goes on
'''


@pytest.fixture(autouse=True)
def _collect_now():
    yield
    gc.collect()


@pytest.fixture
def at_step(tmp_path, monkeypatch):
    """The override that lets something happen at a step, on a rank: `at_step("Kill", 3, 1)`."""
    (tmp_path / "at_step.py").write_text(CALLBACKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda name, step, rank=0: (
        f"+trainer.callbacks.own={{_target_: at_step.{name}, step: {step}, rank: {rank}}}"
    )


@pytest.fixture
def fail(small_run, train, capfd):
    """Run two ranks that fail, before pytest's timeout; gives the reason, which all share."""

    def run_and_fail(*overrides):
        run = train(*small_run, *TWO_RANKS, *overrides, code=runtime.FAILED)
        assert run.status["state"] == "failed"
        assert run.status["reason"] in capfd.readouterr().err
        return run.status["reason"]

    return run_and_fail


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_killed_rank_ends_the_run(rank, fail, at_step):
    assert f"rank {rank} was killed by SIGKILL" in fail(at_step("Kill", 4, rank))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_sleeping_rank_is_named_and_not_the_one_that_waits_for_it(rank, fail, at_step):
    reason = fail(at_step("Sleep", 4, rank), "trainer.timeout_s=20")
    assert reason.startswith(f"trainer.timeout_s=20 -> rank {rank} has made no progress since step")
    assert "at_step.py:" in reason  # where it sleeps


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_frozen_rank_is_named(rank, fail, at_step):
    reason = fail(at_step("Stop", 4, rank), "trainer.timeout_s=10")
    assert f"rank {rank} has not been heard of since step" in reason


def test_loss_of_one_rank_that_is_no_number_stops_all_ranks(fail, at_step):
    reason = fail(at_step("NaN", 4, 1), "trainer.log_every_steps=5")
    assert "trainer.guard.nonfinite=stop -> the loss on rank 1 is not finite at step 4" in reason


SKIP = "trainer.guard.nonfinite=skip"


def weights(run):
    return load_weights(run.find_checkpoint("last"))


def assert_same_weights(one, other):
    one, other = weights(one), weights(other)
    assert all(equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_skipped_step_is_as_if_left_out(optimizer, small_run, train, at_step):
    small_run += [f"module.optimizer.name={optimizer}", "max_steps=8"]
    skipped = train(*small_run, "run.name=skipped", SKIP, at_step("NaN", 4))
    left_out = train(*small_run, "run.name=left_out", at_step("LeaveOut", 4))
    assert_same_weights(skipped, left_out)
    later = train(*small_run, "run.name=later", at_step("LeaveOut", 5))
    with pytest.raises(AssertionError):
        assert_same_weights(skipped, later)


@pytest.mark.slow  # each strategy's own path is in tests/trainers/test_parity.py
def test_step_that_one_rank_spoils_is_skipped_by_all(small_run, train, at_step):
    two = train(*small_run, *TWO_RANKS, SKIP, at_step("NaN", 4, 1), "max_steps=6")
    rows = [row for row in read_metrics(two.path / "metrics.jsonl") if "train/loss" in row]
    assert [row["train/skipped_steps"] for row in rows] == [0.0] * 3 + [1.0] * 3
    assert two.summary["step"] == 6
    assert all(tensor.isfinite().all() for tensor in weights(two).values())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.guard.nonfinite=ignore", "nonfinite=ignore -> unknown -> use one of stop, skip"),
        ("trainer.guard.spike.action=warn", "action=warn -> unknown -> use one of stop, skip"),
        ("trainer.guard.spike.factor=0.5", "factor=0.5 -> every loss .* -> use more than 1"),
        ("trainer.guard.spike.memory_steps=0", "memory_steps=0 -> .* -> use 1 or more"),
        ("trainer.timeout_s=0", "trainer.timeout_s=0 -> it is a number -> use 1 or more"),
        ("trainer.timeout_s=null", "trainer.timeout_s=None -> it is a number -> use 1 or more"),
    ],
)
def test_impossible_setting_is_refused(override, message, small_run, compose):
    with pytest.raises(ValueError, match=message):
        check(compose("train", [*small_run, override]), 1)
