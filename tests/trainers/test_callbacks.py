from types import SimpleNamespace

import pytest
import torch

from trainers.callbacks.checkpointing import Checkpointing
from trainers.callbacks.randomness import KeyedRandomness
from trainers.callbacks.step_guard import StepGuard
from trainers.callbacks.step_metrics import PEAK_FLOPS, peak_flops
from trainers.callbacks.step_vote import StepVote

SPIKE = {"factor": None, "action": "stop", "memory_steps": 100}


def draw(step, micro=0, rank=0, seed=1):
    trainer = SimpleNamespace(global_step=step, global_rank=rank, accumulate_grad_batches=4)
    module = SimpleNamespace(device=torch.device("cpu"))
    KeyedRandomness(seed=seed).on_train_batch_start(trainer, module, None, 4 * step + micro)
    return torch.rand(1).item()


def test_randomness_is_a_function_of_seed_step_micro_batch_and_rank():
    assert draw(3) == draw(3)
    others = [draw(4), draw(3, micro=1), draw(3, rank=1), draw(3, seed=2)]
    assert len({draw(3), *others}) == 5


@pytest.mark.parametrize("behind", [0, 1])
def test_batch_counters_follow_the_accumulation(behind, tmp_path):
    counts = {"ready": 12, "started": 12, "processed": 12, "completed": 12 - behind}
    progress = {"total": dict(counts), "current": dict(counts), "is_last_batch": True}
    checkpoint = {
        "grad_accum": 4,
        "validation_pending": False,
        "loops": {"fit_loop": {"epoch_loop.batch_progress": progress}},
    }
    callback = Checkpointing(
        tmp_path,
        every_steps=1,
        every_minutes=None,
        keep_last=1,
        keep_every_steps=None,
        max_gib=None,
        monitor="val/loss",
        guard=StepGuard(nonfinite="stop", spike=SPIKE, max_skips=20),
        vote=StepVote(),
    )
    trainer = SimpleNamespace(accumulate_grad_batches=1)
    callback.on_load_checkpoint(trainer, None, checkpoint)
    expected = {"ready": 3, "started": 3, "processed": 3, "completed": 3 - behind}
    assert progress == {"total": expected, "current": expected, "is_last_batch": False}


def test_peak_flops_are_known_for_gpus_only(monkeypatch):
    assert peak_flops(torch.device("cpu")) is None
    for name, peak in (
        ("NVIDIA H200", PEAK_FLOPS["H200"]),
        ("NVIDIA L40S", PEAK_FLOPS["L40S"]),
        ("NVIDIA L4", PEAK_FLOPS["L4"]),
        ("NVIDIA A100-SXM4-80GB", PEAK_FLOPS["A100"]),
        ("NVIDIA H100 80GB HBM3", PEAK_FLOPS["H100"]),
        ("NVIDIA H100 PCIe", PEAK_FLOPS["H100 PCIe"]),
        ("Tesla V100-SXM2-16GB", None),  # no bf16
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda", 0)) == peak


def test_question_of_one_callback_is_answered_at_the_end_of_a_step():
    vote = StepVote()
    vote.questions = {"save": lambda: False, "stop": lambda: True}
    trainer = SimpleNamespace(accumulate_grad_batches=2, world_size=1, strategy=None)
    vote.on_train_batch_end(trainer, None, None, None, 0)
    assert vote.granted == set()
    vote.on_train_batch_end(trainer, None, None, None, 1)
    assert vote.granted == {"stop"}
