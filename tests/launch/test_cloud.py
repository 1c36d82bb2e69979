"""Task files of SkyPilot, the container file and the scripts for cloud machines."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.launch.sky_schemas import errors_in

ROOT = Path(__file__).parents[2]
CLOUD = ROOT / "launch/cloud"
TASKS = ["sky_one_node", "sky_nodes"]
BIN = Path(sys.executable).parent


def read_task(name):
    return yaml.safe_load((CLOUD / f"{name}.yaml").read_text())


@pytest.fixture
def machine(tmp_path):
    """A clone on a machine, whose Python and folder sharing tell what they were asked to do."""
    for path in (".venv/bin/python", "launch/cloud/share_folder.sh"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(
            '#!/bin/bash\nprintf "%s\\0" "${0##*/}" "$@"\nprintf "\\036"\n'
        )
        (tmp_path / path).chmod(0o755)
    return tmp_path


def commands_of(task, machine, **environment):
    """What `run` of a task starts, as lists of words."""
    given = {"HOME": "/home/me", "PATH": os.environ["PATH"], "BUCKET": "s3://b", "CORPUS": "s3://c"}
    given |= {key: value for key, value in (task["envs"] | task["secrets"]).items() if value}
    done = subprocess.run(
        ["bash", "-c", task["run"]], cwd=machine, env=given | environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return [each.split("\0")[:-1] for each in done.stdout.decode().split("\036")[:-1]]


@pytest.mark.parametrize("name", TASKS)
def test_task_file_is_one_to_skypilot(name):
    assert errors_in(read_task(name)) == []


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda task: task.update(nodes=2), "'nodes' was unexpected"),
        (lambda task: task.update(num_nodes="two"), "'two' is not of type 'integer'"),
        (lambda task: task["envs"].update(BUCKET=7), "7 is not of type 'string', 'null'"),
        (lambda task: task["resources"].update(use_spott=True), "'use_spott' was unexpected"),
        (lambda task: task["resources"].update(infra="awss"), "'awss' does not match"),
        (
            lambda task: task["resources"]["job_recovery"].update(recover_on_exit_codes=[256]),
            "is not valid under any of the given schemas",
        ),
    ],
)
def test_task_file_with_a_mistake_is_refused(change, error):
    task = read_task("sky_nodes")
    change(task)
    (message,) = errors_in(task)
    assert error in message


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("mounted", ["true", "false"])
def test_data_is_on_the_disk_of_the_machine_where_one_is_mounted(machine, compose, name, mounted):
    (machine / "bin").mkdir()
    (machine / "bin/mountpoint").write_text(f'[[ "$*" == "-q /mnt/trainyard" ]] && {mounted}\n')
    (machine / "bin/mountpoint").chmod(0o755)
    *_, command = commands_of(
        read_task(name),
        machine,
        PATH=f"{machine}/bin:{os.environ['PATH']}",
        SKYPILOT_NUM_GPUS_PER_NODE="4",
        SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2",
        SKYPILOT_NODE_RANK="1",
        SKYPILOT_NUM_NODES="2",
    )
    data_dir = {"true": "/mnt/trainyard/data", "false": "data"}[mounted]
    assert compose("train", command[3:]).data_dir == data_dir


@pytest.mark.parametrize("wandb_key", ["", "secret"])
def test_one_node_trains_on_all_its_gpus(machine, compose, wandb_key):
    (command,) = commands_of(
        read_task("sky_one_node"),
        machine,
        SKYPILOT_NUM_GPUS_PER_NODE="8",
        WANDB_API_KEY=wandb_key,
        OVERRIDES="experiment=gpt_124m seed=5",
    )
    assert command[:3] == ["python", "-m", "launch.train"]
    config = compose("train", command[3:])
    assert (config.trainer.devices, config.cluster.nodes, config.seed) == (8, 1, 5)
    assert (config.corpus.path, config.runs_dir) == ("s3://c", "s3://b/runs")
    assert config.cluster.notice == "aws"
    assert ("_target_" in config.logger) == bool(wandb_key)


def test_nodes_share_a_folder_and_meet_at_the_first(machine, compose):
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2"}
    for rank in range(2):
        share, command = commands_of(
            read_task("sky_nodes"),
            machine,
            SKYPILOT_NODE_RANK=str(rank),
            SKYPILOT_NUM_GPUS_PER_NODE="4",
            **nodes,
        )
        assert share == ["share_folder.sh", "/home/me/runs", str(rank), nodes["SKYPILOT_NODE_IPS"]]
        config = compose("train", command[3:])
        assert (config.trainer.devices, config.cluster.nodes) == (4, 2)
        assert config.cluster.rendezvous == "10.0.0.1:29500"
        assert (config.runs_dir, config.local_runs_dir) == ("s3://b/runs", "/home/me/runs")


def test_scripts_have_nothing_that_shellcheck_warns_of():
    scripts = sorted(CLOUD.glob("*.sh"))
    assert len(scripts) == 2
    done = subprocess.run([BIN / "shellcheck", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("mistake", ["", "FROM docker.io/nvidia/cuda:latest\n"])
def test_container_file_has_nothing_that_hadolint_warns_of(tmp_path, mistake):
    text = (CLOUD / "Containerfile").read_text()
    (tmp_path / "Containerfile").write_text(text + mistake)
    done = subprocess.run([BIN / "hadolint", tmp_path / "Containerfile"], capture_output=True)
    assert done.returncode == bool(mistake), done.stdout


def test_container_file_copies_what_the_wheel_is_built_of():
    text = (CLOUD / "Containerfile").read_text()
    copied = {
        word for line in text.splitlines() if line.startswith("COPY") for word in line.split()
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) <= copied
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"} <= copied


def test_container_has_what_the_docs_say_that_it_has():
    (extras,) = re.findall(r"'\.\[(.*)\]'", (CLOUD / "Containerfile").read_text())
    assert set(extras.split(",")) == {"s3", "gcs", "slurm", "sweep"}


def test_docs_have_no_command_that_means_something_else_when_pasted():
    docs = (ROOT / "docs/cloud.md").read_text()
    commands = re.findall(r"^sky .*$", docs, flags=re.MULTILINE)
    assert len(commands) > 3
    assert not [command for command in commands if "|" in command]
