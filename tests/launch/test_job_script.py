"""What a job of Slurm's asks for, as `cluster.dry_run=true` shows it. Needs no Slurm."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch import job_script, runtime
from launch.submission import submit

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def script(compose_job, capsys):
    """The script of a job, as `cluster.dry_run=true` prints it: lines, and the folder of logs."""

    def print_script(*overrides):
        config = compose_job("cluster.dry_run=true", *overrides)
        assert submit(config) == runtime.DONE
        return capsys.readouterr().out.splitlines(), f"{config.runs_dir}/small/logs/slurm"

    return print_script


def test_dry_run_prints_all_that_is_asked_for_and_writes_nothing(script, tmp_path):
    lines, logs = script(
        "trainer.accelerator=cuda",
        "cluster.partition=gpus",
        "cluster.account=theirs",
        "cluster.qos=long",
        "cluster.constraint='a100&nvlink'",
        "cluster.time_minutes=90",
        "cluster.signal_ahead_s=60",
        "cluster.cpus_per_task=6",
        "cluster.mem_gb=64",
        "cluster.modules=[gcc, cuda/12.4]",
        "cluster.setup=['source env/bin/activate']",
        "+cluster.sbatch={mail-type: END, exclusive: true, reservation: null}",
        "+cluster.sbatch.nice=0",
        "+cluster.sbatch.reboot=false",
        "cluster.srun=['--cpu-bind=cores']",
    )
    assert lines == [
        "#!/bin/bash",
        "",
        "# Parameters",
        "#SBATCH --account=theirs",
        "#SBATCH --constraint='a100&nvlink'",
        "#SBATCH --cpus-per-task=6",
        "#SBATCH --exclusive",
        "#SBATCH --gpus-per-node=2",
        "#SBATCH --job-name=small",
        "#SBATCH --mail-type=END",
        "#SBATCH --mem=64G",
        "#SBATCH --nice=0",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=2",
        "#SBATCH --open-mode=append",
        f"#SBATCH --output={logs}/%j_0_log.out",
        "#SBATCH --partition=gpus",
        "#SBATCH --qos=long",
        "#SBATCH --requeue",
        "#SBATCH --signal=USR1@60",
        "#SBATCH --time=90",
        "",
        "# setup",
        "module load gcc || exit 1",
        "module load cuda/12.4 || exit 1",
        "source env/bin/activate",
        "",
        "# command",
        "export SUBMITIT_EXECUTOR=slurm",
        f"srun --unbuffered --output {logs}/%j_%t_log.out --cpus-per-task=6 "
        f"--cpu-bind=cores {sys.executable} -u -m submitit.core._submit {logs}",
        "",
    ]
    assert not (tmp_path / "runs").exists()


def test_script_leaves_to_slurm_what_is_not_asked_for(script):
    lines, logs = script("cluster.requeue=false")
    assert [line for line in lines if line.startswith("#SBATCH")] == [
        "#SBATCH --job-name=small",
        "#SBATCH --no-requeue",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=2",
        "#SBATCH --open-mode=append",
        f"#SBATCH --output={logs}/%j_0_log.out",
        "#SBATCH --signal=USR1@120",
    ]
    assert "# setup" not in lines or lines[lines.index("# setup") + 1] == ""


@pytest.mark.parametrize(
    ("overrides", "gpus"),
    [
        (["trainer.accelerator=cpu"], None),
        (["trainer.accelerator=auto"], "2"),
        (["trainer.accelerator=auto", "cluster.gpus_per_node=0"], None),
        (["cluster.gpus_per_node=a100:4"], "a100:4"),
    ],
)
def test_nodes_have_a_gpu_for_each_rank_unless_told_otherwise(script, overrides, gpus):
    asked = [line for line in script(*overrides)[0] if "gpus" in line]
    assert asked == ([f"#SBATCH --gpus-per-node={gpus}"] if gpus else [])


def test_container_of_pyxis_is_for_srun(script):
    container = "{image: 'nvcr.io#nvidia/pytorch', mounts: [/data, '/scratch/me:/scratch']}"
    command = script(f"cluster.container={container}")[0][-2]
    mounts = f"{os.getcwd()}:{os.getcwd()},/data:/data,/scratch/me:/scratch"
    assert f" --container-mounts={mounts} --container-workdir={os.getcwd()} python -u " in command
    assert " '--container-image=nvcr.io#nvidia/pytorch' " in command


def test_container_of_apptainer_is_before_python(script):
    container = "{image: pytorch.sif, runtime: apptainer, mounts: [/data]}"
    options = f"--bind {os.getcwd()}:{os.getcwd()} --bind /data:/data --pwd {os.getcwd()}"
    command = script(f"cluster.container={container}", "cluster.python=python3")[0][-2]
    assert f" apptainer exec {options} pytorch.sif python3 -u " in command
    with_gpus = script(f"cluster.container={container}", "cluster.gpus_per_node=1")[0][-2]
    assert f" apptainer exec --nv {options} pytorch.sif python -u " in with_gpus


def test_options_with_keys_of_their_own_are_in_every_script(script):
    options = {line.split("--")[1].partition("=")[0] for line in script(
        "cluster.partition=p", "cluster.account=a", "cluster.qos=q", "cluster.constraint=c",
        "cluster.time_minutes=9", "cluster.gpus_per_node=1", "cluster.cpus_per_task=1",
        "cluster.mem_gb=0",
    )[0] if line.startswith("#SBATCH")}  # fmt: skip
    assert options - {"open-mode", "output"} == job_script.OWN_KEYS.keys()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cluster.nodes='1:2'", "cluster.nodes=1:2 -> a job has a fixed number of nodes"),
        ("cluster.time_minutes=2", "cluster.signal_ahead_s=120 -> .* asked to stop as soon"),
        ("+cluster.sbatch.gpus_per_node=1", "gpus_per_node=1 -> .* -> use cluster.gpus_per_node"),
        ("cluster.container.runtime=docker", "runtime=docker -> unknown -> use pyxis or apptainer"),
        ("micro_batch=3", "micro_batch=3 -> "),
        ("strategy=single", "strategy=single -> .* there are 4 ranks"),
    ],
)
def test_contradiction_is_refused_before_a_submission(stand_in, compose_job, override, message):
    with pytest.raises(ValueError, match=message):
        submit(compose_job(override))
    assert not stand_in.scripts


def test_cluster_of_ones_own_is_a_file(command, small_run, tmp_path):
    text = (ROOT / "docs/slurm.md").read_text()
    (listing,) = re.findall(r"^```yaml\n(.*?)```", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "ours.yaml").write_text(listing)
    overrides = ["--config-dir", str(tmp_path), "cluster=ours", "cluster.dry_run=true", *small_run]
    done = subprocess.run(command("train", *overrides), capture_output=True, text=True)
    assert done.returncode == runtime.DONE, done.stderr
    for line in ("#SBATCH --exclusive", "#SBATCH --account=mine", "source env/bin/activate"):
        assert line in done.stdout.splitlines()
    assert " python -u -m submitit" in done.stdout  # the environment's, not the submitter's


def test_own_script_is_correct_shell():
    shellcheck = Path(sys.executable).parent / "shellcheck"
    path = ROOT / "launch/slurm/train.sbatch"
    done = subprocess.run([shellcheck, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
