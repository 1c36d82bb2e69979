"""Ranks are killed, hosts go and come back: the run goes on with the samples that come next."""

import signal

import pytest

from tests.cluster.elastic_runs import ElasticRun
from tests.cluster.hosts import Hosts
from tests.cluster.recording import samples_of, world_sizes
from trainers.checkpoint import load_weights
from trainers.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, small_settings):
    """The run of two ranks that all others must repeat."""
    run = ElasticRun(tmp_path_factory.mktemp("undisturbed"), small_settings)
    run.start("here", *run.command, "trainer.devices=2")
    assert run.wait() == {"here": 0}, run.output()
    return run


@pytest.fixture
def hosts(tmp_path):
    with Hosts(3, tmp_path / "hosts") as hosts:
        yield hosts


@pytest.fixture
def run(tmp_path, small_settings, hosts):
    return ElasticRun(tmp_path, small_settings, hosts)


def losses(run):
    rows = read_metrics(run.directory.path / "metrics.jsonl")
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def weights(run):
    return load_weights(run.directory.find_checkpoint("last"))


def assert_same_run(run, other, *, bits):
    assert run.directory.status["state"] == "done", run.output()
    assert samples_of(run.records) == samples_of(other.records)
    assert losses(run) == (losses(other) if bits else pytest.approx(losses(other), abs=1e-5))
    if bits:
        mine, theirs = weights(run), weights(other)
        assert mine.keys() == theirs.keys()
        assert all(mine[name].equal(theirs[name]) for name in mine)


@pytest.mark.hosts
def test_killed_rank_is_started_anew_with_all_others(run, undisturbed):
    run.pace(0.3)
    for host in ("host1", "host2"):
        run.torchrun(host, nodes="2", max_restarts=2)
    run.wait_until(lambda: run.step >= 7, "step 7")
    run.signal_ranks("host2", signal.SIGKILL)
    run.wait_until(lambda: len(world_sizes(run.records)) == 2, "another start")
    run.pace(0)
    assert set(run.wait().values()) == {0}, run.output()
    assert world_sizes(run.records) == [2, 2]
    assert_same_run(run, undisturbed, bits=True)


@pytest.mark.hosts
def test_run_shrinks_when_a_host_dies_and_grows_when_it_is_back(run, undisturbed):
    run.pace(0.5)
    for host in run.hosts.names:
        run.torchrun(host, nodes="1:3", max_restarts=3)
    run.wait_until(lambda: run.step >= 6, "step 6 on three hosts")
    run.hosts.crash("host3")
    run.wait_until(lambda: world_sizes(run.records) == [3, 2], "a start on two")
    before = run.step
    run.wait_until(lambda: run.step > before, "a step on two")
    run.hosts.boot("host3")
    run.torchrun("host3", nodes="1:3", max_restarts=3)
    run.wait_until(lambda: world_sizes(run.records) == [3, 2, 3], "a start on three")
    run.pace(0)
    assert set(run.wait().values()) == {0}, run.output()
    assert_same_run(run, undisturbed, bits=False)
