"""A real Slurm cluster of two nodes on this machine, and what may happen to it."""

import contextlib
import fcntl
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

HERE = Path(__file__).parent / "slurm"
ROOT = Path(__file__).parent.parent.parent
LOCK = Path(tempfile.gettempdir(), "trainyard-slurm.lock")
"""Of the names and addresses, which a machine has once."""
PATIENCE_S = 600
"""After which a test gives up waiting. Slurm takes half a minute to miss a node, and twelve seconds
to start again what was requeued; the rest is starts of ranks on a busy machine."""
POLL_S = 0.2
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"}
"""States that a job does not leave any more."""


class SlurmCluster:
    """Two nodes, `node1` and `node2`, under one Slurm controller.

    Each node is a set of namespaces with its own name, address and processes; files are shared.
    Jobs have this process's environment, with its Python first and this tree's packages.

    Args:
        folder: Of its configuration and logs, and of the logs of jobs.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),  # how commands find this cluster
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT),
        }
        self._jobs: list[str] = []
        self._crashed: set[str] = set()
        self._cut_off: set[str] = set()
        self._keeper: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, once no other is up; it ends by `stop`, or with this process in any case.

        A shell reads from a pipe that only this process can write to. When that is closed, also
        because this process was killed, it takes the cluster down. It has inherited the lock.
        """
        with LOCK.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._keeper = subprocess.Popen(
                ["bash", "-c", 'cat; exec "$0" "$1"', str(HERE / "down.sh"), str(self.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=[lock.fileno()],
                start_new_session=True,  # Ctrl-C in a terminal is not for it
            )
        self._up()

    def stop(self) -> None:
        """End all jobs, nodes and daemons, and remove the folder."""
        assert self._keeper
        assert self._keeper.stdin
        self._keeper.stdin.close()
        self._keeper.wait()

    # -- jobs -----------------------------------------------------------------------------------

    def submit(self, script: str | Path, *arguments: str, options: Sequence[str] = ()) -> str:
        """Submit a batch script with arguments and options of sbatch; gives the job's number."""
        log = ["--output", str(self.folder / "job-%j.log"), "--open-mode=append"]
        said = self._run("sbatch", "--parsable", *log, *options, str(script), *arguments)
        self._jobs.append(said.strip())
        return self._jobs[-1]

    def state(self, job: str) -> str:
        """`PENDING`, `RUNNING`, `COMPLETED`, ..., as Slurm says it."""
        return self.facts(job)["JobState"]

    def facts(self, job: str) -> dict[str, str]:
        """All that Slurm says of a job: `Restarts`, `Reason`, `NodeList`, ..."""
        said: list[str] = []

        def is_said() -> bool:
            with contextlib.suppress(BusyError):
                said.extend(self._run("scontrol", "show", "job", "--oneliner", job).split())
            return bool(said)

        wait_until(is_said, f"what Slurm says of job {job}")
        return dict(word.split("=", 1) for word in said if "=" in word)

    def wait_for(self, job: str, state: str) -> None:
        """Wait until a job is in a state.

        Raises:
            AssertionError: It has ended in another one, or takes too long.
        """

        def is_there() -> bool:
            now = self.state(job)
            assert now == state or now not in ENDED, f"job {job} is {now}, not {state}"
            return now == state

        wait_until(is_there, f"job {job} to be {state}")

    def requeue(self, job: str) -> None:
        """Let Slurm stop a job, and start it again later."""
        self._run("scontrol", "requeue", job)

    def logs(self) -> dict[str, str]:
        """What jobs have printed, and what the controller has."""
        paths = [self.folder / f"job-{job}.log" for job in self._jobs]
        paths.append(self.folder / "slurmctld.log")
        return {path.name: path.read_text(errors="replace") for path in paths if path.exists()}

    # -- nodes ----------------------------------------------------------------------------------

    def crash(self, node: str) -> None:
        """End all processes of a node at once, and see them gone, with the ports that they had."""
        first = self._process(node)
        all_of_it = [first, *first.children(recursive=True)]
        first.kill()
        wait_until(lambda: all(map(is_over, all_of_it)), f"all of {node} to end")
        self._crashed.add(node)

    def cut(self, node: str) -> None:
        """Pull a node's network cable; its processes live on."""
        self._run("ip", "link", "set", f"slurmlab-{node}", "down")
        self._cut_off.add(node)

    def programs(self, node: str) -> list[str]:
        """The command lines of all processes of a node."""
        found = []
        for each in self._process(node).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it ends meanwhile
                found.append(" ".join(each.cmdline()))
        return found

    def heal(self) -> None:
        """Start broken nodes afresh, as an administrator would."""
        if not self._crashed | self._cut_off:
            return
        # While Slurm still tries to tell a lost node to end a job, the job waits for its BeginTime.
        # A node that came back now would be told so, and leave the job that is about to start.
        wait_until(lambda: "BeginTime" not in self._reasons(), "Slurm to be done with lost nodes")
        for node in self._cut_off - self._crashed:
            self.crash(node)
        self._up()
        self._crashed.clear()
        self._cut_off.clear()

    def _reasons(self) -> str:
        return self._run("squeue", "--noheader", "--format=%r")

    def _process(self, node: str) -> psutil.Process:
        return psutil.Process(int((self.folder / f"{node}.pid").read_text()))

    def _up(self) -> None:
        self._run(str(HERE / "up.sh"), str(self.folder), "2")

    def _run(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        said = f"{' '.join(command)}: {done.stdout}{done.stderr}"
        if done.returncode != 0 and "timed out" in said:
            raise BusyError(said)
        assert done.returncode == 0, said
        return done.stdout


class BusyError(AssertionError):
    """Slurm has not answered in time."""


def is_over(process: psutil.Process) -> bool:
    """Whether a process has ended; nobody need have asked how."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    """Wait until something is so.

    Raises:
        AssertionError: It takes too long; names `what` was waited for.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S} s in vain for {what}"
        time.sleep(POLL_S)
