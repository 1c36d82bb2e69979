"""`cluster=slurm` without Slurm: stand-ins for its commands say what the real ones would."""

import json
import pickle
import signal
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launch import runtime
from launch.run_directory import StoppedError
from launch.submission import Rank, submit, submit_array


def test_submission_keeps_the_configuration_as_it_was_composed(stand_in, compose_job, capsys):
    config = compose_job("cluster.partition=main")
    text = OmegaConf.to_yaml(config)
    assert submit(config) == runtime.DONE
    logs = Path(config.runs_dir, "small", "logs", "slurm")
    printed = capsys.readouterr().out
    assert "run small: submitted as job 12, 2 node(s) with 2 rank(s) each" in printed
    assert f"follow: tail -F {logs}/12_0_log.out" in printed
    rank = pickle.loads((logs / "12_submitted.pkl").read_bytes()).function
    assert rank == Rank(text)
    assert "${" in rank.config  # what depends on the node is for the node to find out
    assert "#SBATCH --partition=main" in stand_in.scripts[0]


def test_job_that_is_submitted_when_a_signal_comes_is_noted(stand_in, compose_job, capsys):
    stand_in.interrupt()
    with pytest.raises(StoppedError, match="SIGINT"):
        submit(compose_job())
    assert "submitted as job 12" in capsys.readouterr().out
    run = Path(compose_job().runs_dir, "small")
    assert json.loads((run / "job.json").read_text())["job"] == "12"
    assert (run / "logs/slurm/12_submitted.pkl").exists()


@pytest.mark.parametrize(
    ("said", "override", "message"),
    [
        ("Invalid partition name specified", "cluster.partition=fast", "-> use one of high, main"),
        ("Invalid account or account/partition combination", "cluster.account=no", "-> `sacctmgr"),
        ("Invalid qos specification", "cluster.qos=no", "-> `sacctmgr"),
        ("Requested time limit is invalid", "cluster.time_minutes=9", "-> `sinfo"),
        ("Unable to contact slurm controller", "cluster=slurm", "-> mend that"),
    ],
)
def test_refusal_of_sbatch_is_one_message_and_leaves_nothing(
    stand_in, compose_job, capfd, said, override, message
):
    stand_in.refuse(f"sbatch: error: Batch job submission failed: {said}")
    with pytest.raises(ValueError, match="->") as error:
        submit(compose_job(override))
    start = f"{override} -> sbatch: Batch job submission failed: {said}"
    assert str(error.value).startswith(start)
    assert message in str(error.value)
    assert capfd.readouterr().err == ""
    run = Path(compose_job().runs_dir, "small")
    assert [path.name for path in run.rglob("*") if path.is_file()] == [".lock"]
    stand_in.refuse("")
    assert submit(compose_job()) == runtime.DONE


def test_missing_submitit_is_said_with_what_installs_it(stand_in, compose_job, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match=r"submitit, .* -> pip install 'trainyard\[slurm\]'"):
        submit(compose_job())


def test_missing_slurm_is_said_and_a_script_needs_none(compose_job, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="cluster=slurm -> there is no `sbatch` on this machine"):
        submit(compose_job())
    assert submit(compose_job("cluster.dry_run=true")) == runtime.DONE
    assert "srun --unbuffered" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("state", "name", "is_refused"),
    [
        ("RUNNING", "small", True),
        ("PENDING", "small", True),
        ("FAILED", "small", False),
        ("RUNNING", "of-another-cluster", False),
    ],
)
def test_run_that_is_a_job_is_not_submitted_again(stand_in, compose_job, state, name, is_refused):
    submit(compose_job())
    stand_in.job(state, name)
    if is_refused:
        with pytest.raises(ValueError, match=rf"small -> it is job 12 already, {state} .*12_0_log"):
            submit(compose_job())
    else:
        submit(compose_job())
    assert len(stand_in.scripts) == 2 - is_refused


def test_run_that_slurm_has_forgotten_is_submitted_again(stand_in, compose_job):
    submit(compose_job())
    stand_in.forget()
    submit(compose_job())
    assert len(stand_in.scripts) == 2


def test_done_run_shows_its_summary_and_changes_are_found_before_the_queue(
    stand_in, compose_job, small_run, train, capsys
):
    train(*small_run)
    assert submit(compose_job()) == runtime.DONE
    assert "small: done" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"module\.network\.width: 32 -> 64"):
        submit(compose_job("module.network.width=64"))
    with pytest.raises(ValueError, match="max_steps: 20 -> 30"):
        submit(compose_job("max_steps=30"))
    assert not stand_in.scripts
    submit(compose_job("max_steps=30", "resume.extend=true"))
    assert len(stand_in.scripts) == 1


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        (runtime.DONE, runtime.DONE),
        (runtime.PREEMPTED, runtime.PREEMPTED),
        (StoppedError("SIGUSR1"), runtime.PREEMPTED),
        (ValueError("batch_samples=3 -> why not -> use 4"), runtime.FAILED),
    ],
)
def test_rank_of_a_job_ends_with_the_runs_code(compose_job, monkeypatch, capsys, ends, code):
    given = []

    def train(config):
        given.append(config)
        with pytest.raises(StoppedError, match="SIGUSR1"):  # and not submitit's handler
            signal.raise_signal(signal.SIGUSR1)
        if isinstance(ends, BaseException):
            raise ends
        return ends

    monkeypatch.setattr("launch.train.train", train)
    config = compose_job()
    with pytest.raises(SystemExit) as end:
        Rank(OmegaConf.to_yaml(config))()
    assert end.value.code == code
    assert given == [config]
    assert (capsys.readouterr().err == f"error: {ends}\n") == (code == runtime.FAILED)
    signal.raise_signal(signal.SIGUSR1)  # is not heard any more


def test_array_is_one_job_of_many_runs(stand_in, compose_job, tmp_path):
    configs = [compose_job(f"run.name=run-{number}", f"seed={number}") for number in range(3)]
    texts = [OmegaConf.to_yaml(config) for config in configs]
    logs = tmp_path / "sweep"
    assert submit_array("seeds", configs, logs, at_once=2) == ["12_0", "12_1", "12_2"]
    (script,) = stand_in.scripts
    assert "#SBATCH --array=0-2%2\n" in script
    assert "#SBATCH --job-name=seeds\n" in script
    assert f"--output {logs}/%A_%a_%t_log.out" in script
    for number, text in enumerate(texts):
        pickled = (logs / f"12_{number}_submitted.pkl").read_bytes()
        assert pickle.loads(pickled).function == Rank(text)
        noted = (Path(configs[0].runs_dir) / f"run-{number}" / "job.json").read_text()
        log = str(logs / f"12_{number}_0_log.out")
        assert json.loads(noted) == {"job": f"12_{number}", "name": "seeds", "log": log}
    stand_in.job("RUNNING", "seeds")
    with pytest.raises(ValueError, match="run-1 -> it is job 12_1 already"):
        submit(compose_job("run.name=run-1"))


def test_array_of_runs_that_ask_for_different_things_is_refused(stand_in, compose_job, tmp_path):
    configs = [compose_job("run.name=one"), compose_job("run.name=two", "trainer.devices=4")]
    with pytest.raises(ValueError, match=r"run\.name=two -> it asks for ntasks_per_node=4, .*2"):
        submit_array("seeds", configs, tmp_path / "sweep", at_once=2)
    assert not stand_in.scripts
