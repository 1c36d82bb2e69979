"""What asks a run to stop: signals to all its processes, its budget, a notice of the cloud."""

import signal
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import psutil
import pytest

from launch import runtime
from launch.run_directory import RunDirectory
from trainers.callbacks.preemption import BUDGET, NOTICE, PreemptedError, Preemption
from trainers.callbacks.step_vote import StepVote
from trainers.checkpoint import read_last
from trainers.limits import check_values
from trainers.metrics import read_metrics
from trainers.slowest_rank import SLOW

AT_STEP = """
import os
import signal
import time
from lightning.pytorch import Callback

class AtStep(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        import served  # of the test
        if batch_idx == 5:
            served.is_given.set()
            assert served.is_seen.wait(timeout=60)

class StopAtTheEnd(Callback):
    def teardown(self, trainer, pl_module, stage):
        os.kill(os.getpid(), signal.SIGTERM)

class SlowOnRankOne(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        time.sleep(0.3 * trainer.global_rank)
"""


@pytest.fixture
def own_callback(tmp_path, monkeypatch):
    """A folder with callbacks of the user's; gives the override that adds one."""
    (tmp_path / "own.py").write_text(AT_STEP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    return lambda name: f"+trainer.callbacks.own={{_target_: own.{name}}}"


def losses(run):
    rows = read_metrics(run.path / "metrics.jsonl")
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


@pytest.fixture
def notice(monkeypatch):
    """A service at `url` that gives notice once `is_given`, and then has been `is_seen`."""
    served = SimpleNamespace(is_given=threading.Event(), is_seen=threading.Event())

    class Service(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"TRUE" if served.is_given.is_set() else b"FALSE")

        def log_message(self, format, *args):
            """Say nothing of each request."""

    monkeypatch.setitem(sys.modules, "served", served)
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        served.url = f"http://127.0.0.1:{server.server_port}/"
        yield served
        server.shutdown()


def test_notice_stops_the_run_at_that_step_and_it_continues(
    small_run, train, own_callback, notice, monkeypatch, capfd
):
    whole = train(*small_run, "run.name=whole")
    say = "trainers.spot_notices.SpotNotices._say"
    monkeypatch.setattr(say, lambda self, text: (print(text), notice.is_seen.set()))
    cluster = ["cluster.notice_every_s=0.02", f"cluster.notice={notice.url}"]
    at_step = own_callback("AtStep")
    run = train(*small_run, *cluster, at_step, code=runtime.PREEMPTED)
    assert run.status["step"] == 6
    assert run.status["reason"].startswith("cluster.notice;")
    assert read_last(run.checkpoints) == "step-00000006"
    assert "is to stop: TRUE" in capfd.readouterr().out
    train(*small_run, at_step)
    assert losses(run) == losses(whole)


def test_budget_stops_the_run_and_the_next_launch_has_one_of_its_own(small_run, train):
    budget = ["cluster.budget_minutes=1e-9", "max_steps=3", "trainer.val_every_steps=3"]
    budget += ["checkpoints.every_steps=null"]
    for step in (1, 2):
        run = train(*small_run, *budget, code=runtime.PREEMPTED)
        assert run.status["step"] == step
        assert run.status["reason"].startswith("cluster.budget_minutes;")
    train(*small_run, *budget)  # the last step needs no stop
    assert run.status["state"] == "done"


def test_signals_to_all_processes_leave_workers_to_the_step(
    small_run, own_callback, start, tmp_path
):
    two_ranks = ["strategy=ddp", "trainer.devices=2", "datamodule.num_workers=2"]
    process = start(*small_run, *two_ranks, "max_steps=200", own_callback("SlowOnRankOne"))
    run = RunDirectory(tmp_path / "runs" / "small")
    start.wait(process, run.path, 3)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 2 + 4
    # Ahead of the limit, and then of `scontrol requeue`: to each process of the job.
    for number in (signal.SIGUSR2, signal.SIGCONT, signal.SIGTERM):
        for each in (*children, process):
            with suppress(psutil.NoSuchProcess):  # by then
                each.send_signal(number)
    output, _ = process.communicate()
    assert process.returncode == runtime.PREEMPTED, output
    assert output.splitlines()[-1].startswith("run small: preempted: SIGUSR2; the same command")
    assert read_last(run.checkpoints) == f"step-{run.status['step']:08d}"
    assert not psutil.wait_procs(children, timeout=30)[1]
    # Meanwhile the rank that the others wait for was named.
    assert "note: rank 1 is the slowest" in output
    rows = read_metrics(run.path / "metrics.jsonl")
    slow = [row for row in rows if row.get("perf/slowdown", 0) > SLOW]
    assert 1 in [row["perf/slowest_rank"] for row in slow]


def asks_requeue(*granted):
    vote = StepVote()
    saving = SimpleNamespace(save=lambda trainer: None, wait=lambda trainer: None)
    preemption = Preemption(saving, vote, ends_at=None, notices=None, ending=lambda: None)
    vote.granted = {*granted}
    trainer = SimpleNamespace(accumulate_grad_batches=1, global_step=1, max_steps=2)
    with pytest.raises(PreemptedError) as stopped:
        preemption.on_train_batch_end(trainer, None, None, None, 0)
    return stopped.value.asks_requeue


def test_job_is_to_start_again_unless_it_was_cancelled():
    for reason in ("SIGUSR1", "SIGUSR2", BUDGET, NOTICE):
        assert asks_requeue("save", reason)  # whichever rank was asked
    assert not asks_requeue("SIGTERM")
    assert not asks_requeue("SIGUSR1", "SIGTERM")
    assert not asks_requeue("SIGINT")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cluster.budget_minutes=0", "cluster.budget_minutes=0 -> .* more than 0, or null for"),
        ("cluster.notice_every_s=null", "cluster.notice_every_s=None -> .* -> use more than 0$"),
        ("cluster.notice=aliyun", "cluster.notice=aliyun -> neither .* aws, gcp, azure, or a url"),
    ],
)
def test_impossible_request_to_stop_is_refused(override, message, small_run, compose):
    with pytest.raises(ValueError, match=message):
        check_values(compose("train", [*small_run, override]))


def test_request_to_stop_what_has_trained_to_its_end_asks_for_nothing(
    small_run, start, own_callback
):
    """Lightning has given its handlers back by then, and ours have not been."""
    process = start(*small_run, "max_steps=2", own_callback("StopAtTheEnd"))
    printed = process.communicate()[0]
    assert process.returncode == runtime.DONE, printed
    assert "small: done: trained 2 steps" in printed
