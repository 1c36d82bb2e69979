"""Ranks are killed, hosts go and come back: the run goes on with the samples that come next."""

import pytest

from launch import runtime
from tests.cluster.elastic_runs import NUM_STEPS, WAIT_S, ElasticRun
from tests.cluster.journal import in_order, what_counts
from tests.cluster.runs import assert_same_training

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, small_settings):
    """The run of two ranks that all others must repeat."""
    run = ElasticRun(tmp_path_factory.mktemp("undisturbed"), small_settings)
    run.start("here", *run.command, "trainer.devices=2")
    assert run.wait() == {"here": 0}, run.output()
    return run


def assert_same_run(run, other):
    """The same samples in the same order, however many ranks there were, and the same losses."""
    assert run.directory.status["state"] == "done", run.output()
    assert in_order(what_counts(run.launches)) == in_order(what_counts(other.launches))
    assert [*run.losses] == [*other.losses] == [*range(1, NUM_STEPS + 1)]
    assert run.losses == pytest.approx(other.losses, abs=1e-5)


def come_to(run, *sizes):
    """Wait until the launches of a run were of so many ranks."""
    run.wait_until(lambda: run.sizes == [*sizes], f"launches of {sizes} ranks")


def test_killed_rank_of_our_own_command_is_started_anew(tmp_path, small_settings, undisturbed):
    run = ElasticRun(tmp_path, small_settings)
    run.linger(0.3)
    run.start("here", *run.command, "trainer.devices=2", "cluster.max_restarts=2")
    run.wait_until(lambda: run.step >= 7, "step 7")
    run.ranks("here")[0].kill()
    come_to(run, 2, 2)
    run.linger(0)
    assert run.wait() == {"here": 0}, run.output()
    logs = [path.read_text() for path in run.path.glob("logs/*/attempt_0/1/stderr.log")]
    assert "rank 0 has not been heard of since step" in "".join(logs)
    assert_same_training(run, undisturbed, NUM_STEPS)


@pytest.mark.hosts
def test_killed_rank_of_torchrun_is_started_anew_with_all_others(run, undisturbed):
    run.linger(0.3)
    for host in ("host1", "host2"):
        run.torchrun(host, nodes="2", max_restarts=2)
    run.wait_until(lambda: run.step >= 7, "step 7")
    run.ranks("host2")[0].kill()
    come_to(run, 2, 2)
    run.linger(0)
    assert run.wait() == {"host1": 0, "host2": 0}, run.output()
    assert "rank 1 on host2 has not been heard of since step" in run.output("host1")
    assert_same_training(run, undisturbed, NUM_STEPS)


@pytest.mark.hosts
def test_run_shrinks_when_a_host_dies_and_grows_when_it_is_back(run, undisturbed):
    run.linger(0.5)
    for host in run.hosts.names:
        run.torchrun(host, nodes="1:3", max_restarts=3)
    run.wait_until(lambda: run.step >= 6, "step 6 on three hosts")
    run.hosts.crash("host3")
    run.linger(5)  # so that it is not done when the host is back
    come_to(run, 3, 2)
    assert "rank 2 on host3 has not been heard of since step" in run.output("host1")
    before = run.step
    run.wait_until(lambda: run.step > before, "a step on two")
    run.hosts.boot("host3")
    run.torchrun("host3", nodes="1:3", max_restarts=3)
    come_to(run, 3, 2, 3)
    run.linger(0)
    assert set(run.wait().values()) == {0}, run.output()
    assert_same_run(run, undisturbed)


@pytest.mark.hosts
def test_host_leaves_our_own_command_and_comes_back(run, undisturbed):
    def start(host):
        own = ["cluster.nodes=1:2", "cluster.rendezvous=host1:29500", "cluster.max_restarts=2"]
        run.start(host, *run.command, *own)

    run.linger(0.5)
    for host in ("host1", "host2"):
        start(host)
    run.wait_until(lambda: run.step >= 6, "step 6 on two hosts")
    run.starter("host2").terminate()
    assert run.processes["host2"].wait(WAIT_S) == runtime.PREEMPTED
    run.linger(5)
    come_to(run, 2, 1)
    start("host2")
    come_to(run, 2, 1, 2)
    run.linger(0)
    assert run.wait() == {"host1": 0, "host2": 0}, run.output()
    assert_same_run(run, undisturbed)
