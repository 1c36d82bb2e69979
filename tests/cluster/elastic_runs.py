"""One run over several hosts, started on each of them as a user would."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from launch.run_directory import RunDirectory
from tests.cluster.hosts import Hosts
from tests.cluster.runs import Run

ROOT = Path(__file__).parent.parent.parent
WAIT_S = 600
NUM_STEPS = 30
OVERRIDES = [
    "batch_samples=12",  # for 1, 2 and 3 ranks
    f"max_steps={NUM_STEPS}",
    "strategy=ddp",
    "trainer.val_every_steps=15",
    # SGD: Adam turns gradients that are zero but for rounding into steps of full size.
    "module.schedule.name=constant",
    "module.schedule.final_lr_fraction=null",
    "module.network.dropout=0.0",
    "module.optimizer.name=sgd",
    "module.optimizer.lr=0.05",
]
QUICK = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=15"
"""What torch's agents are told, so that tests need not wait for its usual 30 seconds.

An agent whose machine pauses for longer than that is lost to those that join."""


class ElasticRun(Run):
    """A run with the commands that train it.

    Args:
        folder: For its run directory and what the commands print.
        overrides: Of all its commands.
        hosts: Where it is started.
    """

    def __init__(self, folder: Path, overrides: list[str], hosts: Hosts | None = None):
        super().__init__(folder / "runs" / "elastic")
        self.directory, self.folder, self.hosts = RunDirectory(self.path), folder, hosts
        journal = f"_target_: tests.cluster.journal.Journal, folder: {self.path / 'journal'}"
        own = [f"runs_dir={folder / 'runs'}", "run.name=elastic"]
        own.append(f"+trainer.callbacks.journal={{{journal}}}")
        self.overrides = [*overrides, *OVERRIDES, *own]
        self.processes: dict[str, subprocess.Popen[str]] = {}

    @property
    def sizes(self) -> list[int]:
        """Number of ranks of each launch that has come to a step."""
        return [max(map(len, launch.values())) for launch in self.launches]

    def torchrun(self, host: str, *overrides: str, nodes: str, max_restarts: int = 0) -> None:
        """Start torchrun on a host; `host1` holds the rendezvous."""
        rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=host1:29500", "--rdzv-id=elastic"]
        options = [f"--nnodes={nodes}", "--nproc-per-node=1", f"--max-restarts={max_restarts}"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", *options, *rendezvous]
        command = [*torchrun, f"--rdzv-conf={QUICK}", "-m", "launch.train"]
        fresh = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as docs/launching.md says
        self.start(host, *command, *self.overrides, *overrides, env=fresh)

    @property
    def command(self) -> list[str]:
        """Our own command."""
        return [sys.executable, "-m", "launch.train", *self.overrides]

    def start(self, host: str, *command: str, **options: Any) -> None:
        """Start a command on a host; without hosts, here.

        Args:
            host: Its name.
            *command: And its arguments.
            **options: Of `subprocess.Popen`; variables of `env` are added to those of here.
        """
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": path} | options.pop("env", {})
        run = partial(self.hosts.run, host) if self.hosts else subprocess.Popen
        with (self.folder / f"{host}.log").open("a") as log:
            streams = {"stdout": log, "stderr": subprocess.STDOUT, "text": True}
            self.processes[host] = run(command, env=environment, **streams, **options)

    def linger(self, seconds: float) -> None:
        """Let each step take so much longer from now on."""
        journal = self.path / "journal"
        journal.mkdir(parents=True, exist_ok=True)
        (journal / ".linger_s").write_text(str(seconds))
        (journal / ".linger_s").rename(journal / "linger_s")

    @property
    def step(self) -> int:
        """The last one that was logged."""
        return max(self.losses, default=0)

    def wait_until(self, is_so: Callable[[], bool], what: str) -> None:
        """Wait for something that the run does."""
        deadline = time.monotonic() + WAIT_S
        while not is_so():
            assert time.monotonic() < deadline, f"not within {WAIT_S} s: {what}\n{self.output()}"
            time.sleep(0.05)

    def wait(self) -> dict[str, int]:
        """Wait until all commands have ended; gives their codes."""
        try:
            return {host: each.wait(WAIT_S) for host, each in self.processes.items()}
        except subprocess.TimeoutExpired as error:
            raise AssertionError(self.output()) from error

    def output(self, host: str | None = None) -> str:
        """What the commands of a host, or of all, have written."""
        paths = sorted(self.folder.glob(f"{host or '*'}.log"))
        return "\n".join(f"--- {path.stem}\n{path.read_text()}" for path in paths)

    def ranks(self, host: str) -> list[psutil.Process]:
        """The ranks of a host, without what has started them."""
        if self.hosts is None:
            found = psutil.Process(self.processes[host].pid).children(recursive=True)
            return [each for each in found if "launch.rank" in words_of(each)]
        found = self.hosts.processes(host, "launch.train")
        return [each for each in found if {"-u", "-P"} & {*words_of(each)}]

    def starter(self, host: str) -> psutil.Process:
        """What has started the ranks of a host."""
        assert self.hosts is not None
        ranks = {each.pid for each in self.ranks(host)}
        found = self.hosts.processes(host, "launch.train")
        return next(each for each in found if each.pid not in ranks)


def words_of(process: psutil.Process) -> list[str]:
    """The command line of a process; nothing of one that has ended."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []
