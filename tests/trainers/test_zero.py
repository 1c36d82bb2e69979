"""ZeRO without ranks: what it places, and loss scales that other strategies can read."""

import lightning
import pytest
import torch
from torch import nn
from torchmetrics import SumMetric

from trainers.strategies.deepspeed_settings import import_deepspeed, read_scale, set_scale
from trainers.strategies.replicated import Single
from trainers.strategies.zero import ZeRO


class Judge(lightning.LightningModule):
    """A part, a network of no part, a buffer of each, a metric."""

    def __init__(self):
        super().__init__()
        self.network, self.judge = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
        self.metric = SumMetric()

    @property
    def parts(self):
        return {"network": self.network}


@pytest.mark.parametrize("stage", [2, 3])
def test_what_is_not_sharded_goes_to_the_device(stage, monkeypatch):
    options = {"precision": "fp32", "device_type": "cpu", "timeout_s": 60}
    strategy = ZeRO(stage=stage, part_stages={}, parameters="fp32", config={}, **options)
    device = torch.device("meta")  # any other than the CPU
    monkeypatch.setattr(ZeRO, "root_device", device)
    module = strategy._lightning_module = Judge()
    strategy.distribute()
    assert module.device == device
    assert {p.device for p in module.judge.parameters()} == {device}
    assert {buffer.device for buffer in module.buffers()} == {device}
    assert module.metric.sum_value.device == device
    left = torch.device("cpu") if stage == 3 else device  # DeepSpeed moves them one by one
    assert {p.device for p in module.network.parameters()} == {left}


@pytest.fixture
def deepspeed_scaler(monkeypatch):
    import_deepspeed("cpu")
    from deepspeed.runtime.fp16 import loss_scaler

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 0)  # it logs
    return lambda: loss_scaler.DynamicLossScaler(2.0**16, 4, 1, 1, False)


def grad_scaler():
    strategy = Single(precision="fp16", device_type="cpu", timeout_s=60)
    strategy.scalers = {"model": torch.amp.GradScaler("cpu", growth_interval=4)}
    strategy.scalers["model"].scale(torch.ones(1))  # makes its tensors
    return strategy


def test_deepspeed_loss_scale_goes_on_where_it_was(deepspeed_scaler):
    whole, first = deepspeed_scaler(), deepspeed_scaler()
    overflows = [True, False, False, True, False, False, False, False, False, False, False, False]
    for overflow in overflows:
        whole.update_scale(overflow)
    for overflow in overflows[:7]:
        first.update_scale(overflow)
    second = deepspeed_scaler()
    set_scale(second, read_scale(first))
    for overflow in overflows[7:]:
        second.update_scale(overflow)
    assert second.cur_scale == whole.cur_scale != first.cur_scale
    assert read_scale(second) == read_scale(whole)


def test_loss_scale_moves_between_deepspeed_and_torch(deepspeed_scaler):
    scaler = deepspeed_scaler()
    for overflow in (True, False, False):
        scaler.update_scale(overflow)
    strategy = grad_scaler()
    strategy.load_loss_scale_state({"model": read_scale(scaler)})
    state = strategy.loss_scale_state()["model"]
    assert state == {"scale": 2.0**15, "steady_steps": 2}
    back = deepspeed_scaler()
    set_scale(back, state)
    assert read_scale(back) == read_scale(scaler)
