"""Whole runs whose `runs_dir` is an object store: trained, resumed on an empty disk, and read."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from fsspec.registry import _registry
from torch import equal

from launch import runtime
from launch.checkpoints import checkpoints
from launch.evaluate import evaluate_run
from launch.export import export_run
from launch.generate import generate
from launch.run_directory import RunDirectory
from tests.datamodules.object_store import BUCKET, ObjectStore
from tests.launch.conftest import wait_for_step
from tests.launch.failing_store import FailingStore, contents, num_checkpoints
from trainers.callbacks.preemption import Preemption
from trainers.checkpoint import load_weights, read_last
from trainers.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("failing_store")

URL = "failing://bucket/runs"
SLOW_STORE = """
import sys, time
if "torch.distributed.run" in sys.orig_argv:  # it kills after a second instead of half a minute
    from torch.distributed.elastic.multiprocessing.api import PContext
    PContext.close.__defaults__ = (None, 1)
from fsspec.implementations.local import LocalFileSystem
put = LocalFileSystem.put_file
def slow(*args, **options):
    time.sleep(2)
    put(*args, **options)
LocalFileSystem.put_file = slow
"""
DONE = {"step-00000015": 4, "step-00000016": 4, "step-00000020": 4}


@pytest.fixture
def local(tmp_path):
    """Where the runs of the store are on this disk."""
    return tmp_path / "local"


@pytest.fixture
def stored_run(small_run, local):
    """Overrides for a run of 20 steps in a store."""
    return [*small_run, f"runs_dir={URL}", f"local_runs_dir={local}"]


def stop_at(monkeypatch, step):
    monkeypatch.setattr(Preemption, "_agree", lambda self, trainer: trainer.global_step == step)


def assert_same_runs(one, other):
    weights = [load_weights(run.find_checkpoint("last")) for run in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    assert all(equal(weights[0][name], weights[1][name]) for name in weights[0])
    for key in ("train/loss", "val/loss"):
        rows = [read_metrics(run.path / "metrics.jsonl") for run in (one, other)]
        values = [[(row["step"], row[key]) for row in each if key in row] for each in rows]
        assert values[0] == values[1]
        assert values[0]


def test_run_resumed_on_an_empty_disk_ends_with_the_same_bits(
    small_run, stored_run, train, local, monkeypatch
):
    whole = train(*small_run)
    with monkeypatch.context() as patch:
        stop_at(patch, 12)
        run = train(*stored_run, code=runtime.PREEMPTED)
    assert "step 12" in run.status["reason"]
    shutil.rmtree(local)
    assert_same_runs(whole, train(*stored_run))
    assert num_checkpoints(f"{URL}/small") == DONE
    shutil.rmtree(local)
    trained = dict(FailingStore.store)
    assert train(*stored_run).summary["step"] == 20  # it is done, and is not trained again
    assert FailingStore.store.keys() == trained.keys()


def test_store_that_fails_from_some_moment_loses_nothing(
    small_run, stored_run, train, local, capfd
):
    whole = train(*small_run)
    FailingStore.failures[:] = [None] * 20
    FailingStore.always = OSError("the network is gone")
    with pytest.raises(ValueError, match=r"small/.* could not be .*network is gone.*whole in"):
        train(*stored_run)
    assert "warning: not uploaded" in capfd.readouterr().err
    run = RunDirectory(local / "small")
    assert run.status["state"] == "done"
    assert_same_runs(whole, run)
    FailingStore.heal()
    shutil.copytree(local, moved := local.with_name("moved"))
    shutil.rmtree(local)
    assert_same_runs(whole, train(*stored_run))  # on an empty disk: from what had arrived
    FailingStore.clear()
    train(*stored_run[:-1], f"local_runs_dir={moved}")  # on the same disk: it is uploaded
    assert num_checkpoints(f"{URL}/small") == DONE
    assert json.loads(contents(f"{URL}/small")["status.json"])["state"] == "done"


def test_stopped_run_keeps_its_code_where_nothing_can_be_uploaded(
    stored_run, train, monkeypatch, capfd
):
    stop_at(monkeypatch, 12)
    FailingStore.failures[:] = [None] * 4
    FailingStore.always = OSError("the network is gone")
    run = train(*stored_run, code=runtime.PREEMPTED)
    assert read_last(run.checkpoints) == "step-00000012"
    assert "the network is gone" in capfd.readouterr().err


def test_store_that_takes_nothing_is_refused_before_training(stored_run, train, local):
    FailingStore.always = PermissionError("Access Denied")
    with pytest.raises(ValueError, match=r"small/config.yaml .*Access Denied, at attempt 1 of 3"):
        train(*stored_run)
    assert not (local / "small/metrics.jsonl").exists()


def test_going_back_on_an_empty_disk_happens_once(stored_run, train, local):
    whole = train(*stored_run)
    losses = read_metrics(whole.path / "metrics.jsonl")
    shutil.rmtree(local)
    back = [*stored_run, "checkpoint=step-00000015"]
    run = train(*back)
    assert "checkpoints/abandoned/step-00000016/manifest.json" in contents(f"{URL}/small")
    assert [row["step"] for row in read_metrics(run.path / "metrics.jsonl")] == [
        row["step"] for row in losses
    ]
    shutil.rmtree(local)
    trained = {name: content for name, content in contents(URL).items() if "abandoned" in name}
    train(*back)
    assert trained == {name: each for name, each in contents(URL).items() if "abandoned" in name}


def test_verbs_fetch_what_they_read(small_run, stored_run, train, compose, local, capfd):
    train(*stored_run)
    for verb, function, fetched, rest in [
        ("evaluate", evaluate_run, "best", []),
        ("generate", generate, "best", ["prompt=a"]),
        ("export", export_run, "last", []),
    ]:
        shutil.rmtree(local)
        runs = [f"runs_dir={URL}", f"local_runs_dir={local}", *rest]
        function(compose(verb, ["run=small", *runs]))
        run = RunDirectory(local / "small")
        (only,) = run.checkpoints.glob("step-*")
        assert only == run.find_checkpoint(fetched)
        with pytest.raises(ValueError, match=r"run=large -> no such run in .* there are: small"):
            function(compose(verb, ["run=large", *runs]))
    shutil.rmtree(local)
    evaluate_run(compose("evaluate", [f"run={URL}/small", f"local_runs_dir={local}"]))
    shutil.rmtree(local)
    here = ["run=small", f"runs_dir={URL}", f"local_runs_dir={local}"]
    checkpoints(compose("checkpoints", here))
    assert "step-00000016, step-00000020 (last)" in capfd.readouterr().out
    assert not list(local.glob("small/checkpoints/step-*"))
    checkpoints(compose("checkpoints", [*here, "action=compare", "with=step-00000015"]))
    assert len(list(local.glob("small/checkpoints/step-*"))) == 2
    with pytest.raises(ValueError, match=r"action=delete -> small is in an object store"):
        checkpoints(compose("checkpoints", [*here, "action=delete", "checkpoint=last"]))
    shutil.rmtree(local)
    run = train(*stored_run, "run.name=new", "init_from=small")
    assert run.summary["step"] == 20


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("s3", r"runs_dir -> s3://bucket/small needs a package .* -> pip install s3fs$"),
        ("gs", r"runs_dir -> gs://bucket/small needs a package .* -> pip install gcsfs$"),
        ("s4", r"runs_dir -> s4://bucket/small is no url that fsspec opens .* -> use s3"),
    ],
)
def test_missing_package_is_named_before_anything_is_prepared(
    stored_run, train, tmp_path, monkeypatch, scheme, message
):
    for name in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(_registry, "s3", raising=False)
    with pytest.raises(ValueError, match=message):
        train(*stored_run, f"runs_dir={scheme}://bucket", f"data_dir={tmp_path / 'data'}")
    assert not (tmp_path / "data").exists()


def test_local_folder_is_local(stored_run, train):
    with pytest.raises(ValueError, match=r"local_runs_dir=memory://x -> .* -> use a local folder"):
        train(*stored_run, "local_runs_dir=memory://x")


@pytest.mark.slow
def test_s3_server_holds_a_run(small_run, stored_run, train, local, monkeypatch):
    server = ObjectStore()
    try:
        monkeypatch.setitem(fsspec.config.conf, "s3", server.options)
        url = f"s3://{BUCKET}/runs"
        with monkeypatch.context() as patch:
            stop_at(patch, 12)
            train(*stored_run, f"runs_dir={url}", code=runtime.PREEMPTED)
        shutil.rmtree(local)
        assert_same_runs(train(*small_run), train(*stored_run, f"runs_dir={url}"))
        assert num_checkpoints(f"{url}/small") == DONE
    finally:
        server.close()


@pytest.mark.slow
def test_killed_run_ends_with_the_same_bits_on_an_empty_disk(
    small_run, train, start, local, tmp_path
):
    long = [*small_run, "max_steps=200", "checkpoints.every_steps=1"]
    whole = train(*long, "checkpoints.every_steps=200")
    long += [f"runs_dir=file://{tmp_path}/store", f"local_runs_dir={local}"]
    for _ in range(3):
        step = random.randint(1, 60)
        last = tmp_path / "store/small/checkpoints/last"
        begun = int(last.read_text()[5:]) if last.exists() else 0
        print(f"killed {step} steps after {begun}")
        process = start(*long)
        start.wait(process, local / "small", min(begun + step, 190))
        process.kill()
        process.wait()
        shutil.rmtree(local)
    assert_same_runs(whole, train(*long))


@pytest.mark.slow
@pytest.mark.parametrize("starter", ["own", "torchrun"])
def test_ranks_wait_for_an_upload_that_takes_longer_than_they_do(
    small_run, train, command, local, tmp_path, monkeypatch, starter
):
    """Ranks that end while rank 0 uploads would have it stopped: by the agent that started them."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_STORE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")
    store = tmp_path / "store/small"
    runs = [f"runs_dir=file://{store.parent}", f"local_runs_dir={local}"]
    ranks = ["strategy=ddp", "trainer.devices=2", "max_steps=4000", "checkpoints.every_steps=null"]
    start = command("train", *small_run, *runs, *ranks)
    if starter == "torchrun":
        start[1:2] = ["-m", "torch.distributed.run", "--nproc-per-node=2", "-m"]
    process = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_step(process, local / "small", 3)
    pid = json.loads((local / "small/status.json").read_text())["pid"]
    os.kill(pid if starter == "torchrun" else process.pid, signal.SIGTERM)
    printed, _ = process.communicate()
    # torchrun would start a rank anew that ends with another code
    assert process.returncode == (runtime.PREEMPTED if starter == "own" else runtime.DONE), printed
    assert "uploaded to file://" in printed
    assert json.loads((store / "status.json").read_text())["state"] == "preempted"
    step = json.loads((store / "status.json").read_text())["step"]
    assert (store / "checkpoints/last").read_text() == f"step-{step:08d}\n"
    shutil.rmtree(local)
    run = train(*small_run, *runs, f"max_steps={step + 1}", "resume.extend=true")
    assert run.summary["step"] == step + 1
