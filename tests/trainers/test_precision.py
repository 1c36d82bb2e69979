"""The table "What is computed in which precision" of docs/parallelism.md, row by row.

Strategies differ in what they keep parameters in; all else is autocast, so one process shows it.
What is kept is measured on ranks, by its bytes (`test_memory.py`) and bits (`test_parity.py`).
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.two_networks import NOISE, POINT, TwoNetworks
from modules.gpt_networks import GPTNetwork
from modules.gpt_presets import shape_from
from trainers.strategies.precision import DTYPES, Autocast

FP32 = {torch.float32}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "linear"}
REDUCTIONS = {"native_layer_norm", "_softmax", "_log_softmax", "nll_loss_forward", "logsumexp"}
KEPT_LOW = pytest.mark.parametrize("is_kept_low", [False, True], ids=["kept_fp32", "kept_low"])
LOW = pytest.mark.parametrize("precision", ["bf16", "fp16"])


class Recorder(TorchDispatchMode):
    """Operation -> dtypes of the numbers that it was given, after autocast."""

    def __init__(self):
        super().__init__()
        self.dtypes = defaultdict(set)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
        self.dtypes[func.overloadpacket.__name__].update(a.dtype for a in given)
        return func(*args, **(kwargs or {}))

    def of(self, operations):
        """Dtypes of all operations of these that there were; at least one."""
        found = operations & self.dtypes.keys()
        assert found
        return set().union(*(self.dtypes[name] for name in found))


@pytest.fixture
def gpt():
    shape = shape_from("gpt2_124m", {"num_layers": 2, "num_heads": 2, "width": 16, "dropout": 0.0})
    network = GPTNetwork(shape, vocab_size=32, sequence_length=8)
    network.initialise(0)
    return network


def run_gpt(network, precision, is_kept_low):
    """Forward and backward of a micro-batch; what was computed, and what blocks handed on."""
    if is_kept_low:
        network.to(DTYPES[precision])
    residuals, tokens = [], torch.arange(16).view(2, 8)
    for block in network.blocks:
        block.register_forward_hook(lambda _, inputs, output: residuals.extend((*inputs, output)))
    with Recorder() as recorder:
        with Autocast(precision, "cpu").forward_context():
            loss = network(tokens, tokens)
        loss.backward()
    return recorder, [r for r in residuals if isinstance(r, torch.Tensor)], loss


@LOW
@KEPT_LOW
def test_gpt_is_computed_as_the_table_says(gpt, precision, is_kept_low):
    recorder, residuals, loss = run_gpt(gpt, precision, is_kept_low)
    assert recorder.of(PRODUCTS) == {DTYPES[precision]}
    assert recorder.of(REDUCTIONS) == FP32
    assert recorder.of({"embedding"}) == FP32
    assert {residual.dtype for residual in residuals} | {loss.dtype} == FP32


def test_recorder_sees_what_torch_alone_would_do():
    with Recorder() as recorder, Autocast("bf16", "cpu").forward_context():
        hidden = torch.nn.Linear(4, 4)(torch.ones(2, 4))
        torch.nn.LayerNorm(4, dtype=torch.bfloat16)(hidden).softmax(-1)
    # On a CPU autocast leaves those in the dtype of their input; the GPT's own do not.
    assert recorder.of({"native_layer_norm", "_softmax"}) == {torch.bfloat16}


@LOW
def test_penalty_is_differentiated_in_fp32_from_within_a_step(precision):
    module = TwoNetworks(optimizer={"lr": 0.1}, r1=0.5, ema_decay=0.9, seed=1)
    autocast = Autocast(precision, "cpu")
    autocast.strategy = SimpleNamespace(differentiate=lambda tensor: tensor.backward())
    with autocast.forward_context():
        penalty = module.penalty(torch.ones(2, POINT))
        with Recorder() as recorder:
            autocast.backward(penalty.sum(), module, None)
        penalty = module.penalty(torch.ones(2, POINT))
        with Recorder() as left_alone:
            penalty.sum().backward()
    assert recorder.of(PRODUCTS) == FP32
    assert DTYPES[precision] in left_alone.of(PRODUCTS)


@LOW
@KEPT_LOW
def test_penalty_is_computed_in_fp32(precision, is_kept_low):
    module = TwoNetworks(optimizer={"lr": 0.1}, r1=0.5, ema_decay=0.9, seed=1)
    averages = {buffer.dtype for buffer in module.buffers()}
    if is_kept_low:  # parts, as engines do
        for part in module.parts.values():
            part.to(DTYPES[precision])
    with Autocast(precision, "cpu").forward_context():
        with Recorder() as penalty:
            module.penalty(torch.ones(2, POINT))
        with Recorder() as scores:
            module.generator_loss(torch.ones(2, POINT), torch.ones(2, NOISE))
    assert penalty.of(PRODUCTS) == FP32
    assert scores.of(PRODUCTS) == {DTYPES[precision]}
    assert averages == {buffer.dtype for buffer in module.buffers()} == FP32
