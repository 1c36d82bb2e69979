"""From `cluster` to what sbatch and srun are asked for, in submitit's words."""

import os
import shlex
import sys
from typing import Any

from omegaconf import DictConfig, OmegaConf

OWN_KEYS = {
    "job-name": "run.name", "nodes": "cluster.nodes", "ntasks-per-node": "trainer.devices",
    "partition": "cluster.partition", "account": "cluster.account", "qos": "cluster.qos",
    "constraint": "cluster.constraint", "time": "cluster.time_minutes",
    "signal": "cluster.signal_ahead_s", "requeue": "cluster.requeue",
    "gpus-per-node": "cluster.gpus_per_node", "cpus-per-task": "cluster.cpus_per_task",
    "mem": "cluster.mem_gb",
}  # fmt: skip
"""Options of sbatch that other keys than `cluster.sbatch` decide."""


def parameters(config: DictConfig) -> dict[str, Any]:
    """What `submitit.SlurmExecutor.update_parameters` is given; None leaves an option out.

    Raises:
        ValueError: The configuration contradicts itself.
    """
    asked = config.cluster
    _refuse_contradictions(asked)
    return {
        "job_name": config.run.name,
        "nodes": asked.nodes,
        "ntasks_per_node": config.trainer.devices,  # a rank each
        "partition": asked.partition,
        "account": asked.account,
        "qos": asked.qos,
        "constraint": asked.constraint,
        "time": asked.time_minutes,
        "gpus_per_node": _gpus_per_node(config) or None,
        "cpus_per_task": asked.cpus_per_task,
        "mem": None if asked.mem_gb is None else f"{asked.mem_gb}G",
        "wckey": None,  # submitit's own would be refused where these are checked
        "stderr_to_stdout": True,  # one file a rank
        "setup": [f"module load {name} || exit 1" for name in asked.modules] + list(asked.setup),
        "srun_args": _srun_arguments(asked),
        "additional_parameters": {
            # To the ranks. Without B: the batch shell, which can do nothing about it, gets none.
            "signal": f"USR1@{asked.signal_ahead_s}",
            "requeue" if asked.requeue else "no-requeue": True,
            **{
                key: value
                for key, value in asked.sbatch.items()
                if value is not None and value is not False  # 0 is a value: nice, say
            },
        },
    }


def python_command(config: DictConfig) -> str:
    """How the job starts Python, as shell."""
    asked, container = config.cluster, config.cluster.container
    if container.image is None:
        return asked.python or shlex.quote(sys.executable)
    python = asked.python or "python"
    if container.runtime == "pyxis":
        return python
    nvidia = ["--nv"] if _gpus_per_node(config) else []
    binds = [part for mount in _mounts(asked) for part in ("--bind", mount)]
    command = ["apptainer", "exec", *nvidia, *binds, "--pwd", os.getcwd(), container.image]
    return f"{shlex.join(command)} {python}"


def _refuse_contradictions(asked: DictConfig) -> None:
    if asked.container.runtime not in ("pyxis", "apptainer"):
        raise ValueError(
            f"cluster.container.runtime={asked.container.runtime} -> unknown -> "
            "use pyxis or apptainer"
        )
    if asked.time_minutes is not None and asked.time_minutes * 60 <= asked.signal_ahead_s:
        raise ValueError(
            f"cluster.time_minutes={asked.time_minutes} cluster.signal_ahead_s="
            f"{asked.signal_ahead_s} -> the job would be asked to stop as soon as it starts -> "
            "give it more time, or let the signal come later"
        )
    for option in asked.sbatch:
        name = str(option).replace("_", "-")
        if name in OWN_KEYS:
            raise ValueError(
                f"cluster.sbatch.{option}={asked.sbatch[option]} -> another key is for this "
                f"option -> use {OWN_KEYS[name]}"
            )


def _gpus_per_node(config: DictConfig) -> int | str:
    if config.cluster.gpus_per_node is not None:
        return config.cluster.gpus_per_node
    return 0 if config.trainer.accelerator == "cpu" else config.trainer.devices


def _srun_arguments(asked: DictConfig) -> list[str]:
    # No --kill-on-bad-exit: its order to a node that is lost waits in Slurm's queue and would meet
    # the rank of the job's next start. Ranks end by themselves with one another.
    arguments: list[str] = []
    if asked.cpus_per_task is not None:  # srun has not taken it over from sbatch since Slurm 22.05
        arguments.append(f"--cpus-per-task={asked.cpus_per_task}")
    if asked.container.image is not None and asked.container.runtime == "pyxis":
        arguments += [
            f"--container-image={asked.container.image}",
            f"--container-mounts={','.join(_mounts(asked))}",
            f"--container-workdir={os.getcwd()}",
        ]
    return arguments + list(asked.srun)


def _mounts(asked: DictConfig) -> list[str]:
    """The working folder, under its own path, and what the configuration names."""
    mounts = [os.getcwd(), *map(str, OmegaConf.to_container(asked.container.mounts) or [])]
    return [mount if ":" in mount else f"{mount}:{mount}" for mount in mounts]
