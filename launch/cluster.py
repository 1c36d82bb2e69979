"""Who has started this process, as which of how many ranks, and what torch is told about it.

Ranks are started by `launch.ranks` (from a run directory, by `launch.rank`), by torchrun, or by
`srun`; the last says in its own words what torch wants to know, and `adopt` translates.
"""

import os
import re
import socket
import time

from omegaconf import DictConfig, OmegaConf

from launch.runtime import DONE, LEFT_BEHIND, PREEMPTED

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
NETWORK = ("GLOO_", "NCCL_")
AGENT_IS_LATE_S = 10.0
FIRST_PORT, NUM_PORTS = 15000, 17000  # below those that Linux gives to outgoing connections


def is_rank() -> bool:
    """Whether somebody else than our own command has started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first() -> bool:
    """Whether this is rank 0, or alone."""
    return os.environ.get("RANK", "0") == "0"


def starter() -> str:
    """Who has started this rank: `torchrun` (or our agent), `srun`, or `somebody`."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    return "srun" if _num_tasks() > 1 else "somebody"


def adopt(config: DictConfig) -> None:
    """Say in torch's words what `srun` says in its own, and which network interface to use."""
    for variable in INTERFACE_VARIABLES if config.cluster.interface else ():
        os.environ[variable] = str(config.cluster.interface)
    if is_rank() or _num_tasks() == 1:
        return
    said = os.environ
    per_node = _tasks_on(int(said["SLURM_NODEID"]), said["SLURM_STEP_TASKS_PER_NODE"])
    cores = int(said.get("SLURM_CPUS_PER_TASK") or max(1, (os.cpu_count() or 1) // per_node))
    said |= {
        "RANK": said["SLURM_PROCID"],
        "WORLD_SIZE": said["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": said["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(per_node),
        "GROUP_RANK": said["SLURM_NODEID"],
        "MASTER_ADDR": first_host(said["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(config.cluster.port or _port_of_job()),
        "OMP_NUM_THREADS": said.get("OMP_NUM_THREADS", str(cores)),
    }


def count_ranks(config: DictConfig) -> int:
    """Ranks of this launch.

    Where somebody else has started them, `trainer.devices` and `cluster.nodes` are filled in.

    Raises:
        ValueError: They are others than the configuration asks for.
    """
    fewest, most = node_range(config)
    devices = config.trainer.devices
    if is_rank():
        ranks, per_node = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        nodes = ranks // per_node
        is_asked = devices in (1, per_node) and (most == 1 or fewest <= nodes <= most)
        if ranks % per_node or not is_asked:
            raise ValueError(
                f"trainer.devices={devices} cluster.nodes={config.cluster.nodes} -> {starter()} "
                f"has started {ranks} rank(s), {per_node} of them on this node -> give the same "
                "numbers to both, or leave them out here"
            )
        devices, most = per_node, nodes
    OmegaConf.update(config, "trainer.devices", devices)
    OmegaConf.update(config, "cluster.nodes", most)
    return devices * most


def node_range(config: DictConfig) -> tuple[int, int]:
    """Fewest and most nodes that `cluster.nodes=<number>|<min>:<max>` allows.

    Raises:
        ValueError: It is neither.
    """
    text = str(config.cluster.nodes)
    if not (found := re.fullmatch(r"(\d+)(?::(\d+))?", text)):
        raise ValueError(f"cluster.nodes={text} -> not a number of nodes -> use 2, or 1:4")
    fewest, most = int(found[1]), int(found[2] or found[1])
    if not 1 <= fewest <= most:
        raise ValueError(f"cluster.nodes={text} -> an empty range -> use 1 or more, in order")
    return fewest, most


def code_for_starter(code: int, fewest_nodes: int = 1) -> int:
    """The exit code by which a rank tells who has started it.

    torchrun starts ranks again that end with any code but 0, and what was preempted is not to be,
    unless another node has left a run that goes on without it. `srun` ends all ranks with the first
    that does, and rank 0 has the last word. `status.json` has the truth.

    Args:
        code: Of `launch.runtime`.
        fewest_nodes: That `cluster.nodes` allows.
    """
    if code == LEFT_BEHIND:
        code, ranks = PREEMPTED, int(os.environ.get("WORLD_SIZE", 1))
        nodes = ranks // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if nodes > 1 and starter() == "torchrun":
            # An agent that has seen a new node a second later than the first to see it would take
            # ranks that have ended for done. Its signal ends this wait.
            time.sleep(AGENT_IS_LATE_S)
            return PREEMPTED if nodes > fewest_nodes else DONE
    is_understood = starter() != "torchrun" and is_first()
    return DONE if code == PREEMPTED and is_rank() and not is_understood else code


def network_notes(num_ranks: int) -> list[str]:
    """What is set of gloo and NCCL, for rank 0 to say once where there are several ranks."""
    settings = {name: os.environ[name] for name in sorted(os.environ) if name[:5] in NETWORK}
    if num_ranks == 1 or not settings:
        return []
    return ["network: " + " ".join(f"{name}={value}" for name, value in settings.items())]


def first_host(nodes: str) -> str:
    """The first name of a list as Slurm writes it: `gpu[07-09,12],login1` -> `gpu07`."""
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    assert found, nodes
    return found[1] + (found[2] or "") + (found[3] or "")


def host() -> str:
    """This machine's name."""
    return socket.gethostname()


def _num_tasks() -> int:
    """Tasks of this step of `srun`; 1 in a batch script, which is none, and elsewhere."""
    is_step = "SLURM_PROCID" in os.environ and "SLURM_STEP_NODELIST" in os.environ
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) if is_step else 1


def _tasks_on(node: int, per_node: str) -> int:
    """Read `2(x3),1`: two tasks on each of three nodes, and one on the fourth."""
    counts: list[int] = []
    for part in per_node.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts[node]


def _port_of_job() -> int:
    """One port for all ranks of a step, and another for other steps and for its next start."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    job, step, restarts = (int(os.environ.get(name, 0)) for name in names)
    return FIRST_PORT + (job * 101 + step * 11 + restarts) % NUM_PORTS
