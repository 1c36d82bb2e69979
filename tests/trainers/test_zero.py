"""ZeRO without ranks: what it places and tells DeepSpeed, its guard, its loss scales."""

from types import SimpleNamespace

import lightning
import pytest
import torch
from torch import nn
from torchmetrics import SumMetric

from trainers.strategies.deepspeed_settings import (
    KNOWN,
    complete_config,
    import_deepspeed,
    read_scale,
    set_scale,
)
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


def make_zero(stage, **options):
    options |= {"precision": "fp32", "device_type": "cpu", "timeout_s": 60}
    return ZeRO(stage=stage, part_stages={}, parameters="fp32", config={}, **options)


@pytest.mark.parametrize("stage", [2, 3])
def test_what_is_not_sharded_goes_to_the_device(stage, monkeypatch):
    strategy = make_zero(stage)
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


class Reads(dict):
    """A configuration that notes the keys it is asked for at the top level."""

    def __init__(self, config):
        super().__init__(config)
        self.keys_read = set()

    def __contains__(self, key):
        self.keys_read.add(key)
        return super().__contains__(key)

    def __copy__(self):
        return self

    def get(self, key, default=None):
        self.keys_read.add(key)
        return super().get(key, default)

    def keys(self):  # type: ignore[override]
        return self  # for `in`


def test_known_keys_are_those_that_deepspeed_reads():
    import_deepspeed("cpu")
    from deepspeed.runtime import config

    read = Reads({"train_micro_batch_size_per_gpu": 1})
    config.DeepSpeedConfig(read)
    refused = {*config._REMOVED_TOP_LEVEL_CONFIG_KEYS, "bfloat16"}
    # It asks for the size of ranks that share sequences only where there are ranks.
    assert read.keys_read - refused - {"sequence_parallel_size"} == KNOWN


@pytest.mark.parametrize(
    ("dtype", "section"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, None)]
)
def test_sections_of_precision_are_completed_and_not_replaced(dtype, section):
    config = {
        "bf16": {"check_grad_overflow": False},
        "fp16": {"hysteresis": 3},
        "zero_optimization": {},
    }
    completed = complete_config(config, stage=2, clip=None, dtype=dtype)
    assert completed["bf16"] == {"check_grad_overflow": False, "enabled": section == "bf16"}
    assert completed["fp16"] == {"hysteresis": 3, "enabled": section == "fp16"}


class Guard:
    """Calls every step off, and knows why or does not."""

    def __init__(self, reason):
        self.reason = reason

    def __call__(self, part, loss, norm):
        return ~norm.isfinite() | True

    def check(self, trainer):
        if self.reason:
            raise FloatingPointError(self.reason)


def zero_with_engine(guard, norm=1.0):
    """A strategy whose engine is about to step by an optimizer that is not fused."""
    inner = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    strategy = make_zero(2, guard=guard)
    strategy.parallel_devices = [torch.device("cpu")]
    optimizer = SimpleNamespace(optimizer=inner, _global_grad_norm=norm)
    strategy.engines = {"model": SimpleNamespace(optimizer=optimizer)}
    strategy._lightning_module = Judge()
    strategy._lightning_module.trainer = SimpleNamespace()
    strategy._losses = {"model": torch.ones(())}
    return strategy


def test_step_called_off_in_an_engine_has_the_reason_of_the_guard():
    with pytest.raises(FloatingPointError, match="the loss on rank 1"):
        zero_with_engine(Guard("the loss on rank 1"))._before_inner_step("model")
    with pytest.raises(ValueError, match=r"SGD cannot do that .* -> .* fused=True"):
        zero_with_engine(Guard(None))._before_inner_step("model")


@pytest.mark.parametrize("norm", [-1.0, float("inf"), float("nan"), torch.tensor(-1.0)])
def test_norm_that_deepspeed_could_not_take_is_not_finite(norm):
    assert zero_with_engine(None, norm)._norm("model") == float("inf")
    assert zero_with_engine(None, 2.0)._norm("model") == 2


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
