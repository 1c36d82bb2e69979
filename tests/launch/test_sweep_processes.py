"""Jobs of a sweep as processes, by a stand-in for training."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from omegaconf import OmegaConf

from launch import sweep_processes
from launch.run_directory import StoppedError
from launch.sweep_processes import run_here
from launch.sweep_record import Job, Sweep

STAND_IN = str(Path(__file__).parent / "stand_in_job.py")


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_processes, "PROGRAM", (STAND_IN,))
    sweep = Sweep(tmp_path / "sweeps" / "s", objective="val/loss")
    sweep.hold()
    yield sweep
    sweep.release()


@pytest.fixture
def job(sweep, tmp_path):
    """Make a job of the sweep: `job("a", loss=1.0)`."""

    def make(run, *, devices=1, accelerator="cpu", **given):
        overrides = [f"{key}={value}" for key, value in given.items()]
        overrides += [f"runs_dir={tmp_path}", f"run.name={run}"]
        job = Job(run, {key: str(value) for key, value in given.items()}, overrides)
        job.directory = str(tmp_path / run)
        sweep.jobs[run] = job
        config = OmegaConf.create({"trainer": {"devices": devices, "accelerator": accelerator}})
        return job, config

    return make


def starts(job):
    rows = [json.loads(row) for row in Path(job.directory, "starts.jsonl").read_text().splitlines()]
    return [row for row in rows if "began" in row]


def times(job):
    began, ended = map(json.loads, Path(job.directory, "starts.jsonl").read_text().splitlines())
    return began["began"], ended["ended"]


def when(condition, then):
    """Do something in a thread once a condition holds."""

    def wait():
        wait_for(condition)
        then()

    threading.Thread(target=wait, daemon=True).start()


def wait_for(condition):
    while not condition():
        time.sleep(0.02)


def test_failed_job_does_not_stop_the_others(sweep, job):
    jobs = [job("a", loss=2.5), job("b", code=1), job("c", code=9), job("d", loss=0.5)]
    run_here(sweep, jobs, [], 1)
    written = Sweep.read(sweep.folder).jobs
    assert [each.state for each in written.values()] == ["done", "failed", "failed", "done"]
    assert [each.objective for each in written.values()] == [2.5, None, None, 0.5]
    assert written["b"].reason == "key=value -> made to fail -> do not"
    assert written["a"].steps == 3
    assert "made to fail" in sweep.log(jobs[1][0]).read_text()


def test_jobs_run_one_after_another_or_several_at_a_time(sweep, job, tmp_path):
    first, second = job("a", loss=1), job("b", loss=1)
    run_here(sweep, [first, second], [], 1)
    assert times(first[0])[1] <= times(second[0])[0]
    go = tmp_path / "go"
    both = [job("c", loss=1, wait=go), job("d", loss=1, wait=go)]
    paths = [Path(each.directory, "starts.jsonl") for each, _ in both]
    when(lambda: all(path.exists() for path in paths), go.touch)  # else they would wait for good
    run_here(sweep, [*both, job("e", loss=1)], [], 2)
    assert [each.state for each in sweep.jobs.values()] == ["done"] * 5


def test_devices_are_divided_among_jobs(sweep, job, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,GPU-x,7")
    go = tmp_path / "go"
    cuda = {"devices": 2, "accelerator": "auto", "loss": 1}
    jobs = [job("a", wait=go, **cuda), job("b", wait=go, **cuda), job("c", **cuda)]
    paths = [Path(each.directory, "starts.jsonl") for each, _ in jobs[:2]]
    when(lambda: all(path.exists() for path in paths), go.touch)
    run_here(sweep, jobs, [], 2)
    seen = [starts(each)[0]["environment"]["CUDA_VISIBLE_DEVICES"] for each, _ in jobs]
    assert sorted(seen[:2]) == ["0,1", "GPU-x,7"]
    assert seen[2] in seen[:2]
    with pytest.raises(
        ValueError, match=r"sweep\.jobs=3 .* need 6 devices, and 4 .* sweep\.jobs=2"
    ):
        run_here(sweep, jobs, [], 3)


def test_jobs_do_not_take_themselves_for_ranks(sweep, job, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("OMP_NUM_THREADS")
    run_here(sweep, [job("a", loss=1)], [], 1)
    environment = starts(sweep.jobs["a"])[0]["environment"]
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"} & environment.keys()
    assert environment["OMP_NUM_THREADS"] == str(os.cpu_count())


def test_jobs_do_not_ask_for_another_start_of_what_they_run_in(sweep, job):
    one, config = job("a", loss=1)
    one.overrides.append("cluster.requeue=true")
    before = list(one.overrides)
    run_here(sweep, [(one, config)], [], 1)
    assert starts(one)[0]["given"]["cluster.requeue"] == "false"
    assert one.overrides == before


def test_signal_is_passed_on_once_and_no_job_begins_after_it(sweep, job):
    jobs = [job("a", loss=1, wait="never"), job("b", loss=1)]
    path = Path(jobs[0][0].directory, "starts.jsonl")
    when(path.exists, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(StoppedError, match="SIGINT"):
        run_here(sweep, jobs, [], 1)
    assert Path(jobs[0][0].directory, "stopped").read_text() == "SIGTERM"
    assert [each.state for each in sweep.jobs.values()] == ["preempted", "waiting"]


def test_signal_that_comes_again_lets_a_job_save(sweep, job, tmp_path):
    jobs = [job("a", loss=1, wait=tmp_path / "saved", deaf=1)]
    path, heard = (Path(jobs[0][0].directory, name) for name in ("starts.jsonl", "stopped"))

    def stop_twice():
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(heard.exists)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        (tmp_path / "saved").touch()

    when(path.exists, stop_twice)
    with pytest.raises(StoppedError, match="SIGTERM"):
        run_here(sweep, jobs, [], 1)
    assert sweep.jobs["a"].state == "done"


def test_second_ctrl_c_kills_a_job_that_does_not_end(sweep, job):
    jobs = [job("a", loss=1, wait="never", deaf=1)]
    path, heard = (Path(jobs[0][0].directory, name) for name in ("starts.jsonl", "stopped"))

    def interrupt_twice():
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(heard.exists)
        os.kill(os.getpid(), signal.SIGINT)

    when(path.exists, interrupt_twice)
    with pytest.raises(StoppedError):
        run_here(sweep, jobs, [], 1)
    assert sweep.jobs["a"].state == "failed"
    assert sweep.jobs["a"].reason == "killed by SIGKILL"
    assert not psutil.pid_exists(starts(sweep.jobs["a"])[0]["pid"])


def test_no_job_outlives_a_sweep_that_is_killed(sweep, job, tmp_path):
    job("a", loss=1, wait="never")
    code = (
        "import sys; from pathlib import Path; from omegaconf import OmegaConf\n"
        "from launch import sweep_processes; from launch.sweep_record import Sweep\n"
        f"sweep_processes.PROGRAM = ({STAND_IN!r},)\n"
        "sweep = Sweep.read(Path(sys.argv[1]))\n"
        "trainer = {'devices': 1, 'accelerator': 'cpu'}\n"
        "config = OmegaConf.create({'trainer': trainer})\n"
        "sweep_processes.run_here(sweep, [(sweep.jobs['a'], config)], [], 1)\n"
    )
    sweep.write()
    killed = subprocess.Popen([sys.executable, "-c", code, str(sweep.folder)])
    path = Path(sweep.jobs["a"].directory, "starts.jsonl")
    while not path.exists() or not path.read_text():
        assert killed.poll() is None
        time.sleep(0.02)
    orphan = psutil.Process(starts(sweep.jobs["a"])[0]["pid"])
    killed.kill()
    killed.wait()
    gone, _ = psutil.wait_procs([orphan], timeout=20)
    assert gone or orphan.status() == psutil.STATUS_ZOMBIE


def test_objective_that_a_run_does_not_report_fails_the_job(sweep, job):
    sweep.objective = "val/accuracy"
    run_here(sweep, [job("a", loss=1), job("b", loss=1)], [], 1)
    assert [each.state for each in sweep.jobs.values()] == ["failed", "failed"]
    reason = sweep.jobs["a"].reason
    assert reason.startswith("sweep.objective=val/accuracy -> run a reports no such value -> use")
    assert "val/loss" in reason


def test_objective_that_is_not_finite_fails_the_job(sweep, job):
    run_here(sweep, [job("a", loss="nan")], [], 1)
    assert (sweep.jobs["a"].state, sweep.jobs["a"].objective) == ("failed", None)
    assert "val/loss of run a is nan" in sweep.jobs["a"].reason
