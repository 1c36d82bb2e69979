import time
from types import SimpleNamespace

import pytest
import torch

from trainers.callbacks.own_work import OwnWork
from trainers.slowest_rank import SlowestRank


def name(rank):
    return f"rank {rank} on node{rank}"


def test_slow_rank_is_named_once_and_when_it_is_another(capsys):
    slowest = SlowestRank(name)

    def said(*own_s, says=True):
        row = slowest.row(own_s, step_s=2.0, says=says)
        assert set(row) == {"perf/slowest_rank", "perf/slowdown"}
        return capsys.readouterr().err

    assert said(1.0, 1.0, 2.0, 1.0) == ""  # of what happens once
    assert said(1.0, 1.0, 2.0, 1.0, says=False) == ""
    assert said(1.0, 1.0, 2.0, 1.0).startswith("note: rank 2 on node2 is the slowest: ")
    assert said(1.0, 1.0, 2.0, 1.0) == ""
    assert said(1.0, 1.4, 1.0, 1.0) == ""  # not by much
    assert said(0.01, 0.1, 0.01, 0.01) == ""  # of no account in a step
    assert "rank 1 on node1 is the slowest" in said(1.0, 3.0, 2.0, 1.0)


def test_slowdown_is_that_of_the_slowest_over_the_median():
    row = SlowestRank(name).row([0.5, 0.2, 0.4, 0.3], step_s=1.0, says=False)
    assert row == {"perf/slowest_rank": 0, "perf/slowdown": pytest.approx(0.5 / 0.3)}
    two = SlowestRank(name).row([0.1, 0.3], step_s=1.0, says=False)  # no median lies between
    assert two == {"perf/slowest_rank": 1, "perf/slowdown": pytest.approx(3.0)}


@pytest.mark.parametrize("shards_parameters", [False, True])
def test_own_work_ends_where_ranks_meet(monkeypatch, shards_parameters):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    strategy = SimpleNamespace(shards_parameters=shards_parameters, root_device=torch.device("cpu"))
    data = SimpleNamespace(seconds_waited=100.0)  # before training
    trainer, own = SimpleNamespace(strategy=strategy, datamodule=data), OwnWork()
    own.on_train_start(trainer, None)

    def micro_batch(loading, callbacks, forward, backward):
        clock[0] += loading
        data.seconds_waited += loading
        own.on_train_batch_start(trainer, None, None, 0)
        clock[0] += callbacks
        own.begin_forward(trainer)
        clock[0] += forward
        own.on_before_backward(trainer, None, None)
        clock[0] += backward
        own.on_before_backward(trainer, None, None)  # of another part: after ranks have met
        clock[0] += backward

    micro_batch(1.0, 2.0, 4.0, 1000.0)
    micro_batch(8.0, 16.0, 32.0, 1000.0)
    assert own.take(trainer) == (27.0 if shards_parameters else 63.0)
    assert own.take(trainer) == 0.0


@pytest.mark.gpu
def test_own_work_on_cuda_is_the_forward_pass_on_the_device():
    device = torch.device("cuda")
    strategy = SimpleNamespace(shards_parameters=False, root_device=device)
    trainer, own = SimpleNamespace(strategy=strategy, datamodule=None), OwnWork()
    own.on_train_start(trainer, None)
    matrix = torch.randn(4096, 4096, device=device)

    def steps(in_forward, in_backward):
        for _ in range(3):
            own.on_train_batch_start(trainer, None, None, 0)
            own.begin_forward(trainer)
            for _ in range(in_forward):
                torch.mm(matrix, matrix)
            own.on_before_backward(trainer, None, None)
            for _ in range(in_backward):
                torch.mm(matrix, matrix)
        return own.take(trainer)

    steps(1, 1)  # what happens once
    # As the device takes it: the host is done with both long before.
    assert steps(200, 1) > 10 * steps(1, 200)
    assert not own._events
