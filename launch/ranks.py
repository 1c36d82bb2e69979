"""The ranks that this command starts by torch's elastic agent, and what became of them."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from launch.cluster import is_rank, node_range
from launch.meeting import wait_until
from launch.run_directory import RunDirectory
from launch.runtime import DONE, FAILED, LAUNCHED_AT, PREEMPTED, hear_no_stops, launched_at

KILLED_BY = {
    "SIGKILL": ": somebody killed it, or the machine was out of memory, which is the usual reason "
    "-> see `dmesg` -> lower micro_batch or datamodule.num_workers",
    "SIGABRT": ": a library gave up, often NCCL -> see the end of its output",
    "SIGSEGV": ": a library is broken or does not fit another -> see the end of its output",
}
"""What to look for after a signal."""

CODES = {"done": DONE, "preempted": PREEMPTED, "failed": FAILED}
"""Of the states in which a run has ended."""

AGENT_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
"""What ends an agent, which passes it on to its ranks."""

AGENT = "TRAINYARD_AGENT"
"""Environment variable of ranks that our own command has started: the process that has."""

LATE_S = 30.0
"""In which a rank 0 on another node has said how the run has ended."""

FRESH_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""What an agent must be told where ranks may start more than once. It would keep its store, with
all that earlier ranks have left there, and nodes that come later would not learn where it is."""


def start(run: RunDirectory, num_ranks: int, max_restarts: int) -> int:
    """Run `launch.rank` for an accepted run on every device of this machine.

    Rank 0 shares this terminal; the others write to `<run directory>/logs`.

    Args:
        run: The run.
        num_ranks: One for each device.
        max_restarts: How often all are started anew, from the newest checkpoint, after one failed.

    Returns:
        The run's exit code.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std

    (run.path / "logs").mkdir(exist_ok=True)
    logs = DefaultLogsSpecs(
        log_dir=str(run.path / "logs"), redirects=dict.fromkeys(range(1, num_ranks), Std.ALL)
    )
    alone = {"min_nodes": 1, "max_nodes": 1, "rdzv_endpoint": "localhost:0"}
    return _run_agent(
        run,
        ["-P", "-m", "launch.rank", str(run.path)],
        _rank_environment(num_ranks) | (FRESH_STORE if max_restarts else {}),
        nproc_per_node=num_ranks,
        max_restarts=max_restarts,
        logs_specs=logs,
        local_addr="127.0.0.1",
        **alone,
    )


def are_of_nodes(config: DictConfig) -> bool:
    """Whether this command is to start the ranks of its node, in a run over several."""
    return not is_rank() and config.cluster.rendezvous is not None


def start_on_node(run: RunDirectory, config: DictConfig) -> int:
    """Start this node's ranks by the command that this is, as torchrun would; they meet the others.

    Returns:
        The run's exit code.

    Raises:
        ValueError: The other nodes cannot be met.
    """
    from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError

    fewest, most = node_range(config)
    place, timeout_s = config.cluster.rendezvous, int(config.cluster.rendezvous_timeout_s)
    if most == 1:
        raise ValueError(
            f"cluster.nodes=1 cluster.rendezvous={place} -> one node has nobody to meet -> give "
            "cluster.nodes=2, or 1:4, or leave cluster.rendezvous out"
        )
    try:
        return _run_agent(
            run,
            ["-P", "-m", "launch.train", *sys.argv[1:]],
            _rank_environment(config.trainer.devices) | FRESH_STORE,
            min_nodes=fewest,
            max_nodes=most,
            nproc_per_node=config.trainer.devices,
            rdzv_endpoint=place,
            rdzv_configs={"join_timeout": timeout_s, "read_timeout": timeout_s},
            max_restarts=config.cluster.max_restarts,
        )
    except RendezvousClosedError:
        return _code_after_others(run)
    except RendezvousError as error:
        raise ValueError(
            f"cluster.rendezvous={place} -> {_what_failed(error, fewest)} within "
            f"cluster.rendezvous_timeout_s={timeout_s} -> start this command on the other nodes, "
            "too, that of the rendezvous among them, and see whether its port may be reached"
        ) from error


def _run_agent(
    run: RunDirectory, command: list[str], environment: dict[str, str], **options: Any
) -> int:
    """Run a Python command on all ranks by torch's elastic agent, and find out how it ended."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    before, status, owns_run = dict(os.environ), run.status, command[2] == "launch.rank"
    os.environ |= environment
    try:
        agent = LaunchConfig(
            run_id=run.path.name,
            rdzv_backend="c10d",
            signals_to_handle=",".join(AGENT_SIGNALS),
            **options,
        )
        with _agent_signals():
            elastic_launch(agent, sys.executable)(*command)
    except SignalException as error:
        return _code_after_signal(run, status, signal.Signals(error.sigval).name, owns_run)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if owns_run and failure.exitcode < 0 and _has_ended_well(run, status):
            return CODES[run.status["state"]]
        return _code_after_failure(run, status, rank, failure.exitcode)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return PREEMPTED if run.status.get("state") == "preempted" else DONE


@contextmanager
def _agent_signals() -> Iterator[None]:
    """Let signals end the agent in its own way from the first moment; what it leaves is put back.

    It takes them when it has ranks. Before, another exception would close the rendezvous for all
    nodes.
    """
    from torch.distributed.elastic.multiprocessing import SignalException

    def stop(number: int, frame: object) -> None:
        raise SignalException(f"stopped by signal {number}", signal.Signals(number))

    numbers = [signal.Signals[name] for name in AGENT_SIGNALS]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        hear_no_stops()  # all that is left is to find out how it has ended
        for number, handler in before.items():
            signal.signal(number, handler)


def _rank_environment(num_ranks: int) -> dict[str, str]:
    threads = str(max(1, (os.cpu_count() or 1) // num_ranks))
    return {
        "PYTHONPATH": python_path(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
        # Seconds to finish a step and save in after a signal; torch 2.11 knows 30 only.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",
        LAUNCHED_AT: str(launched_at()),
        AGENT: str(os.getpid()),
    }


def python_path() -> str:
    """For `python -P`, which keeps the working folder from shadowing our packages."""
    home = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join(filter(None, [home, os.getcwd(), os.environ.get("PYTHONPATH", "")]))


def _has_ended_well(run: RunDirectory, before: dict[str, Any]) -> bool:
    """Whether a rank was killed when there was nothing left to do: all had saved together."""
    status = run.status
    return status != before and (status.get("state") == "done" or "asks_requeue" in status)


def _code_after_failure(run: RunDirectory, before: dict[str, Any], rank: int, exitcode: int) -> int:
    """Say which rank ended the run and why; the others fail after it, with less to tell.

    Raises:
        ValueError: The ranks did not come to have the run.
    """
    if exitcode == PREEMPTED:
        return PREEMPTED
    if exitcode > 0 and run.status == before and before.get("state") != "starting":
        raise ValueError(
            f"rank {rank} -> it was refused before it touched run {run.path.name}, and has said "
            "why -> see its `error:` line above"
        )
    names = (f"*/attempt_*/{rank}/stderr.log", f"*/rank{rank}.log")  # of one node, of several
    logs = chain.from_iterable((run.path / "logs").glob(name) for name in names)
    log = max(logs, key=os.path.getmtime, default=None) if rank else None
    status = run.status
    if exitcode < 0:
        name = signal.Signals(-exitcode).name
        reason = f"rank {rank} was killed by {name}" + KILLED_BY.get(name, "")
    elif status.get("is_cause") or (rank == 0 and status.get("state") == "failed"):
        reason = status["reason"]
    else:
        reason = f"rank {rank} ended with code {exitcode}"
        if log is not None:
            reason += f": {(log.read_text(errors='replace').splitlines() or ['(no output)'])[-1]}"
    if log is not None:
        reason += f" (all of it: {log})"
    run.write_failure(reason, status.get("step", 0))
    print(f"error: {reason}", file=sys.stderr)
    return FAILED


def _what_failed(error: Exception, fewest: int) -> str:
    from torch.distributed.elastic.rendezvous.api import RendezvousTimeoutError

    if isinstance(error, RendezvousTimeoutError):
        return f"fewer than cluster.nodes={fewest} have met there"
    return f"nobody there has answered ({error.__cause__ or error})".replace("\n", " ")


def _code_after_others(run: RunDirectory) -> int:
    """The other nodes have ended the run while this one was to join them; its status tells how."""
    state, reason = run.status.get("state"), run.status.get("reason")
    print(f"the other nodes have ended the run: {state}: {reason}", file=sys.stderr)
    return CODES.get(state or "", FAILED)


def _code_after_signal(run: RunDirectory, before: dict[str, Any], name: str, owns_run: bool) -> int:
    """The agent has passed a signal on and lost the ranks' codes; the run's status tells.

    Args:
        run: The run.
        before: Its status when the agent was started.
        name: Of the signal.
        owns_run: Whether all ranks are this process's. Else rank 0 may be another node's, which
            says a while later how the run has ended, or goes on without this node.
    """
    if not owns_run:

        def has_ended() -> bool:
            return run.status != before and run.status.get("state") in CODES

        with suppress(ValueError):
            wait_until(has_ended, "the end of the run", LATE_S)
        return CODES[run.status["state"]] if has_ended() else PREEMPTED
    state = run.status.get("state")
    if state == "starting":
        run.write_status("preempted", f"{name} before the first step")
    if state == "running":
        run.write_status("failed", f"{name}; the ranks ended before they could save")
    return CODES.get(run.status.get("state", ""), FAILED)


def die_with_parent() -> None:
    """Ask Linux to end this rank when the process that started it is killed, or end it now."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    parent = str(os.getppid())
    if os.environ.get(AGENT, parent) != parent:  # killed already, and another may have the run
        os._exit(1)
