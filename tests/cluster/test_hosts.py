"""What a run over several hosts says and does when it may not start, and when it is to stop."""

import contextlib
import os
import shutil
import signal
import subprocess

import psutil
import pytest

from launch import runtime
from launch.start_facts import OURS
from tests.cluster.elastic_runs import ROOT
from trainers.checkpoint import verify

pytestmark = [pytest.mark.hosts, pytest.mark.slow, pytest.mark.timeout(1800)]
MEET = ["cluster.nodes=2", "cluster.rendezvous=host1:29500"]


def test_host_with_other_code_packages_and_overrides_is_named(run, tmp_path):
    other = tmp_path / "other"
    for package in OURS:
        shutil.copytree(ROOT / package, other / package)
    (other / "modules" / "extra.py").write_text("# a change\n")
    (other / "tokenizers-0.1.dist-info").mkdir()
    (other / "tokenizers-0.1.dist-info" / "METADATA").write_text("Name: tokenizers\nVersion: 0.1\n")
    run.start("host1", *run.command, *MEET)
    path = os.pathsep.join([str(other), str(ROOT)])
    differs = [*run.command, *MEET, "module.optimizer.lr=0.07"]
    run.start("host2", *differs, cwd=other, env={"PYTHONPATH": path})
    assert set(run.wait().values()) == {runtime.FAILED}
    for host in ("host1", "host2"):
        said = run.output(host)
        assert "Traceback" not in said
        assert "error: host2 (rank 1) -> tokenizers=0.1 where rank 0 on host1 has " in said
        assert ", code=" in said
        assert (
            ", module.optimizer.lr=0.07 where rank 0 on host1 has 0.05 -> give every rank" in said
        )
    assert run.sizes == []


def test_hosts_that_nobody_answers_give_up_and_say_where(run):
    run.hosts.crash("host1")
    soon = "cluster.rendezvous_timeout_s=3"
    run.start("host2", *run.command, *MEET, soon)
    alone = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "host1", "MASTER_PORT": "29501"}
    run.start("host3", *run.command, soon, env=alone)
    assert set(run.wait().values()) == {runtime.FAILED}
    said = run.output("host2")
    assert "error: cluster.rendezvous=host1:29500 -> nobody there has answered" in said
    assert "Traceback" not in said
    assert "cluster.rendezvous_timeout_s=3 -> host1:29501, where rank 0 is to be met, has not" in (
        run.output("host3")
    )


def test_host_that_stays_alone_says_how_many_are_missing(run):
    run.start("host1", *run.command, *MEET, "cluster.rendezvous_timeout_s=3")
    assert run.wait() == {"host1": runtime.FAILED}
    said = run.output("host1")
    assert "error: cluster.rendezvous=host1:29500 -> fewer than cluster.nodes=2 have met" in said
    assert "Traceback" not in said


@pytest.fixture
def small_disk(tmp_path):
    """A disk that hosts share, with room for a few checkpoints; to be made before the hosts."""
    folder = tmp_path / "runs"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_shared_disk_without_room_ends_the_run_on_all_hosts(small_disk, run):
    for host in ("host1", "host2"):
        keeps = ["checkpoints.every_steps=1", "checkpoints.keep_last=100"]
        run.start(host, *run.command, *MEET, *keeps)
    assert set(run.wait().values()) == {runtime.FAILED}
    status = run.directory.status
    assert status["state"] == "failed"
    assert "No space left on device" in status["reason"]
    assert "-> make room" in status["reason"]
    assert verify(run.directory.find_checkpoint("last"))["step"] >= 1


def test_run_that_was_stopped_is_not_started_again_by_torchrun(run):
    run.linger(0.3)

    def start():
        for host in ("host1", "host2"):
            run.torchrun(host, nodes="2", max_restarts=2)

    start()
    run.wait_until(lambda: run.step >= 3, "step 3")
    run.ranks("host2")[0].send_signal(signal.SIGUSR1)
    assert run.wait() == {"host1": 0, "host2": 0}, run.output()
    assert run.directory.status["state"] == "preempted"
    stopped_at = run.directory.status["step"]

    start()
    run.wait_until(lambda: run.step >= stopped_at + 3, "three more steps")
    for starter in [run.starter(host) for host in ("host1", "host2")]:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has followed the other
            starter.terminate()
    run.wait()
    assert run.directory.status["state"] == "preempted", run.output()
    assert run.directory.status["step"] >= stopped_at + 3
    assert run.sizes == [2, 2]
