"""What the guard says of losses and norms, against what a plain reading of its rules says."""

import math
from types import SimpleNamespace

import pytest
import torch

from trainers.callbacks.step_guard import StepGuard

NAN, INF = float("nan"), float("inf")
NO_SPIKES = {"factor": None, "action": "stop", "memory_steps": 4}
SKIP_SPIKES = {"factor": 3.0, "action": "skip", "memory_steps": 4}


class Run:
    """A guard, and a trainer that steps it; `others` are the losses that other ranks read back."""

    def __init__(
        self,
        nonfinite="skip",
        spike=NO_SPIKES,
        max_skips=2,
        dtype=torch.float32,
        folder="no run",
        **state,
    ):
        self.guard = StepGuard(nonfinite=nonfinite, spike=spike, max_skips=max_skips)
        if state:
            self.guard.load_state_dict(state)
        self.others = []
        self.trainer = SimpleNamespace(
            global_step=0,
            world_size=1,
            optimizers=[None],
            default_root_dir=folder,
            strategy=SimpleNamespace(dtype=dtype, all_gather=self.all_gather),
        )
        self.guard.setup(self.trainer, None, "fit")

    def all_gather(self, losses):
        return torch.stack([losses, *(torch.tensor(other) for other in self.others)])

    def judge(self, *losses, norm=1.0, part="model", device="cpu"):
        """Judge steps; the norm is as little finite as the loss."""
        vetoes = []
        for loss in losses:
            norms = torch.tensor(norm if math.isfinite(loss) else loss, device=device)
            vetoes.append(self.guard(part, torch.tensor(loss, device=device), norms))
            self.trainer.global_step += 1
        return vetoes

    def check(self):
        self.guard.check(self.trainer)


def test_stop_leaves_weights_as_they_were_and_names_step_and_checkpoint(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last").write_text("step-00000002\n")
    run = Run("stop", folder=tmp_path)
    assert run.judge(1.0, 1.0, NAN, 1.0) == [False, False, True, True]
    message = r"nonfinite=stop -> the loss on rank 0 is not finite at step 3: .* \(step-00000002\)"
    with pytest.raises(FloatingPointError, match=message):
        run.check()


def test_ranks_whose_loss_is_not_finite_are_named():
    run = Run("stop")
    run.judge(1.0, NAN, 1.0)
    run.others = [[1.0, 1.0, 1.0], [1.0, INF, 1.0], [NAN, 1.0, 1.0]]
    with pytest.raises(FloatingPointError, match=r"on rank 3 is not finite at step 1"):
        run.check()
    run = Run("stop")
    run.judge(1.0, NAN, 1.0)
    run.others = [[1.0, 1.0, 1.0], [1.0, INF, 1.0]]
    with pytest.raises(FloatingPointError, match=r"on ranks 0, 2 is not finite at step 2"):
        run.check()


def test_gradient_alone_stops_too():
    run = Run("stop")
    run.judge(1.0)
    run.judge(1.0, norm=INF)
    with pytest.raises(FloatingPointError, match=r"the gradient is not finite at step 2, while"):
        run.check()


def test_loss_alone_stops_too():
    run = Run("stop")
    run.guard("model", torch.tensor(NAN), torch.tensor(1.0))
    with pytest.raises(FloatingPointError, match="loss on rank 0 is not finite at step 1"):
        run.check()


def test_skips_are_counted_and_too_many_in_a_row_stop():
    run = Run()
    assert run.judge(NAN, 1.0, INF, NAN) == [True, False, True, True]
    run.check()
    assert run.guard.row() == {"train/skipped_steps": 3.0}
    run.judge(1.0, NAN, NAN)
    run.check()
    run.judge(NAN)  # the row goes on across reads
    with pytest.raises(FloatingPointError, match=r"max_skips=2 -> more .* at step 8"):
        run.check()


def test_skips_in_a_row_are_counted_by_part():
    run = Run()
    run.trainer.optimizers = [None, None]
    for _ in range(2):
        run.judge(NAN, part="generator")
        run.judge(1.0, part="discriminator")
    run.check()
    run.judge(NAN, part="generator")
    with pytest.raises(FloatingPointError, match="of part `generator`"):
        run.check()


def test_a_penalty_that_is_never_finite_is_not_left_out_for_ever():
    """It is an update of its own, due every other round, between ones that are taken."""
    run = Run()
    run.trainer.optimizers = [None, None]

    def round_of(*losses):
        for loss in losses:
            run.judge(loss, part="discriminator")
            run.trainer.global_step -= 1
        run.trainer.global_step += 1

    for _ in range(2):
        round_of(1.0, NAN)
        round_of(1.0)
    run.check()
    again = Run(**run.guard.state_dict())
    assert again.guard.skipped_in_a_row == {"discriminator/1": 0, "discriminator/2": 2}
    round_of(1.0, NAN)
    with pytest.raises(FloatingPointError, match=r"max_skips=2 -> .* `discriminator`"):
        run.check()


def test_counts_of_earlier_versions_are_of_the_first_update():
    earlier = {"num_skipped": {"model": 5}, "skipped_in_a_row": {"model": 2}, "levels": {}}
    run = Run(**earlier)
    run.judge(NAN)
    with pytest.raises(FloatingPointError, match="max_skips=2"):
        run.check()


def is_spike_by_hand(losses, factor, memory):
    """The rule in plain Python, in doubles."""
    usual, spikes = [], []
    mean = 0.0
    for loss in losses:
        spikes.append(len(usual) >= memory and abs(loss) > factor * mean)
        if not spikes[-1] and math.isfinite(loss):
            usual.append(abs(loss))
            mean += (usual[-1] - mean) / min(len(usual), memory)
    return spikes


LOSSES = [2.0, 9.0, 2.5, 1.5, 12.0, -11.0, 1.0, 30.0, NAN, 0.5, -0.5, 0.5, 0.5, 0.5, 4.0, 40.0]


def test_spikes_are_those_of_the_rule():
    run = Run(spike=SKIP_SPIKES, max_skips=9)
    expected = is_spike_by_hand(LOSSES, factor=3.0, memory=4)
    assert sum(expected) > 2
    vetoes = run.judge(*LOSSES)
    assert vetoes == [e or math.isnan(loss) for e, loss in zip(expected, LOSSES, strict=True)]
    assert expected != is_spike_by_hand(LOSSES, factor=3.0, memory=8)
    run.check()
    assert run.guard.row()["train/skipped_steps"] == sum(vetoes)


def test_spike_stops_with_both_numbers():
    run = Run(spike=SKIP_SPIKES | {"action": "stop"})
    assert run.judge(2.0, 2.0, 2.0, 2.0, 6.5, 2.0) == [False] * 4 + [True, True]
    with pytest.raises(FloatingPointError, match=r"factor=3.0 -> .* step 5 is 6.5, where 2 is"):
        run.check()


def test_state_goes_on_exactly():
    whole, first = Run(spike=SKIP_SPIKES, max_skips=9), Run(spike=SKIP_SPIKES, max_skips=9)
    vetoes = first.judge(*LOSSES[:7])
    first.check()
    second = Run(spike=SKIP_SPIKES, max_skips=9, **first.guard.state_dict())
    assert vetoes + second.judge(*LOSSES[7:]) == whole.judge(*LOSSES)
    second.check()
    whole.check()
    assert second.guard.state_dict() == whole.guard.state_dict()
    fresh = Run(spike=SKIP_SPIKES, max_skips=9)
    assert fresh.judge(*LOSSES[7:]) != second.judge(*LOSSES[7:])


def test_fp16_overflow_is_no_failure_but_a_collapsed_scale_is():
    run = Run("stop", dtype=torch.float16)
    for norm in (INF, INF, 1.0, INF, NAN):
        run.judge(1.0, norm=norm)
    run.check()
    run.judge(1.0, norm=INF)
    with pytest.raises(FloatingPointError, match=r"max_skips=2 .* choose precision=bf16"):
        run.check()
    run = Run("stop", dtype=torch.float16)
    run.judge(NAN)
    with pytest.raises(FloatingPointError, match="the loss on rank 0 is not finite"):
        run.check()


@pytest.mark.parametrize("spike", [NO_SPIKES, SKIP_SPIKES, SKIP_SPIKES | {"action": "stop"}])
def test_judging_reads_nothing_back(spike):
    """On the meta device there is nothing to read; whatever tries raises."""
    run = Run("stop", spike=spike)
    vetoes = run.judge(*[1.0] * 6, device="meta")
    assert all(veto.shape == () and veto.dtype == torch.bool for veto in vetoes)
    with pytest.raises(RuntimeError, match="meta"):
        run.check()
