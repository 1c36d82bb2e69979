"""Hosts of one machine: namespaces with a name, an address and a process tree each, on a bridge.

Files are shared by all of them, as on a cluster. Several such networks do not see each other, so
that any number of tests can have their own at once.
"""

import contextlib
import itertools
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

NETWORK = "10.78.0"
_numbers = itertools.count()


def why_not() -> str | None:
    """Say why there can be no hosts here; None where there can."""
    tools = [name for name in ("ip", "nsenter", "setpriv", "unshare") if shutil.which(name) is None]
    if tools:
        return f"no {', '.join(tools)}"
    if os.geteuid() != 0:
        return "not root"
    tried = subprocess.run(["unshare", "--net", "--pid", "--fork", "true"], capture_output=True)
    return None if tried.returncode == 0 else "no network namespaces"


class Hosts:
    """Hosts `host1`, `host2`, ... that reach each other by name; to be used in `with`.

    Args:
        count: How many.
        folder: For what they need.
    """

    def __init__(self, count: int, folder: Path):
        self.names = [f"host{number + 1}" for number in range(count)]
        self.folder = folder
        self._network = f"ty{os.getpid()}n{next(_numbers)}"  # an interface's name has 15 letters
        self._first: dict[str, subprocess.Popen[bytes]] = {}
        self._started: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> "Hosts":
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = ["127.0.0.1 localhost"]
        for name in self.names:  # also as sockets that speak IPv6, too, are told of it
            lines += [f"{prefix}{self.address(name)} {name}" for prefix in ("", "::ffff:")]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        try:
            ip("link", "add", self._network, "type", "bridge")
            ip("link", "set", self._network, "up")
            for name in self.names:
                self._plug_in(name)
                self.boot(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for name in self.names:
            self._kill(name)
        for process in self._started:
            process.kill()
            process.wait()
        for name in self.names:  # what was in a namespace is gone, and its cable with it
            ip("netns", "delete", self._namespace(name), may_fail=True)
        ip("link", "delete", self._network, may_fail=True)

    def address(self, name: str) -> str:
        """Where a host is found."""
        return f"{NETWORK}.{11 + self.names.index(name)}"

    def boot(self, name: str) -> None:
        """Start a host, or start it again after a crash, with nothing on it running."""
        inside = (
            f"hostname {name} && mount --bind {self.folder}/hosts /etc/hosts && "
            "mount -t tmpfs tmpfs /dev/shm && touch /dev/shm/is_up; sleep infinity & wait"
        )
        own = ["unshare", "--uts", "--ipc", "--pid", "--mount", "--mount-proc", "--fork"]
        network = ["nsenter", f"--net=/run/netns/{self._namespace(name)}"]
        network = ["setpriv", "--pdeathsig", "KILL", *network]  # none is left if tests are killed
        # Its process 1 is the shell, which reaps, and dies with unshare.
        self._first[name] = subprocess.Popen([*network, *own, "--kill-child", "bash", "-c", inside])
        self.heal(name)
        deadline = time.monotonic() + 20
        while not self._is_up(name):
            assert time.monotonic() < deadline, f"{name} did not start"
            time.sleep(0.02)

    def run(self, name: str, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Start a command on a host, in the folder and environment of this process.

        Args:
            name: Of the host.
            command: And its arguments.
            **options: Of `subprocess.Popen`; output is kept unless they say otherwise.
        """
        folder = str(options.pop("cwd", os.getcwd()))
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(
            [*self._enter(name), "env", f"--chdir={folder}", *command], **(output | options)
        )
        self._started.append(process)
        return process

    def processes(self, name: str, word: str) -> list[psutil.Process]:
        """Processes of a host that have a word in their command line."""
        found = []
        namespace = self._pid_namespace(name)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if os.readlink(f"/proc/{process.pid}/ns/pid") == namespace:
                    found += [process] if word in process.cmdline() else []
        return found

    def crash(self, name: str) -> None:
        """Take a host's power away: all on it is gone, and nobody is told."""
        self.cut(name)
        self._kill(name)

    def cut(self, name: str) -> None:
        """Cut a host off; what runs there goes on."""
        ip("link", "set", self._cable(name), "down")

    def heal(self, name: str) -> None:
        """Connect a host again."""
        ip("link", "set", self._cable(name), "up")

    def _plug_in(self, name: str) -> None:
        namespace, cable = self._namespace(name), self._cable(name)
        ip("netns", "add", namespace)
        peer = ["type", "veth", "peer", "eth0", "netns", namespace]
        ip("link", "add", cable, "master", self._network, *peer)
        ip("-n", namespace, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
        for interface in ("lo", "eth0"):
            ip("-n", namespace, "link", "set", interface, "up")

    def _kill(self, name: str) -> None:
        if first := self._first.pop(name, None):
            first.kill()
            first.wait()

    def _is_up(self, name: str) -> bool:
        with contextlib.suppress(StopIteration, psutil.Error):
            looked = subprocess.run([*self._enter(name), "test", "-e", "/dev/shm/is_up"])
            return looked.returncode == 0
        return False

    def _enter(self, name: str) -> list[str]:
        return ["nsenter", "--all", "--target", str(self._shell(name)), "--"]

    def _shell(self, name: str) -> int:
        return next(iter(psutil.Process(self._first[name].pid).children())).pid

    def _pid_namespace(self, name: str) -> str:
        return os.readlink(f"/proc/{self._shell(name)}/ns/pid")

    def _namespace(self, name: str) -> str:
        return f"{self._network}-{name}"

    def _cable(self, name: str) -> str:
        return f"{self._network}{name.removeprefix('host')}"


def ip(*arguments: str, may_fail: bool = False) -> None:
    """Run `ip`; what may fail is not told of."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert may_fail or done.returncode == 0, (arguments, done.stderr)
