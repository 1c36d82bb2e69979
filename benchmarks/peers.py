"""Readers of other libraries, in processes and an environment of their own, driven over pipes.

Make that environment once, beside this project's so that there is one torch (torchvision, which the
libraries ask for, is not needed and has no build that fits every torch):

    python -m venv peers
    .venv/bin/python -c "import sys; print(*(p for p in sys.path if p.endswith('-packages')),
        sep=chr(10))" > "$(echo peers/lib/python3.*/site-packages)/trainyard.pth"
    peers/bin/pip install --no-deps litdata mosaicml-streaming boto3 botocore s3transfer jmespath
        obstore tifffile brotli python-snappy cramjam zstd catalogue oci circuitbreaker pyOpenSSL
        cryptography cffi pycparser pytz
    python -m benchmarks.stream --peers peers/bin/python

`benchmarks.peer_readers` is the other end.
"""

import json
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from benchmarks.turns import Side, Turn

LIBRARIES = ("litdata", "mosaicml")
"""Each in a process of its own: threads that one leaves behind would slow the other down."""


class Peers:
    """Processes of readers; a context manager that ends them.

    Args:
        python: interpreter of the peers' environment; None has no readers.
        arguments: of `benchmarks.peer_readers`, behind the library.

    Attributes:
        sides: by name.
    """

    def __init__(self, python: str | None, arguments: list[str]) -> None:
        self.sides: dict[str, Side] = {}
        self._processes = ExitStack()
        for library in LIBRARIES if python is not None else ():
            process = _Process([str(python), "-m", "benchmarks.peer_readers", library, *arguments])
            self._processes.callback(process.end)
            greeting = process.answer()
            if greeting["missing"]:
                Console().print(f"no {library}: {greeting['missing']}")
            self.sides |= {name: _PeerSide(process, name) for name in greeting["readers"]}

    def __enter__(self) -> "Peers":
        """Give the readers."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the processes."""
        self._processes.close()


class _Process:
    """A process that answers lines, and is stopped between them: its threads take no turns."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command,
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._questions, self._answers = self._process.stdin, self._process.stdout

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for what is answered."""
        self._process.send_signal(signal.SIGCONT)
        print(json.dumps(request), file=self._questions, flush=True)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Wait for a line.

        Raises:
            RuntimeError: the process has ended.
        """
        if line := self._answers.readline():
            self._process.send_signal(signal.SIGSTOP)
            return json.loads(line)
        raise RuntimeError(f"the peers' process ended with code {self._process.wait()}")

    def end(self) -> None:
        """Close its input, with which it ends."""
        self._process.send_signal(signal.SIGCONT)
        self._questions.close()
        self._process.wait()
        self._answers.close()


class _PeerSide:
    """A `Side` in another process."""

    def __init__(self, process: _Process, name: str) -> None:
        self._process, self._name = process, name

    def turn(self, num_batches: int) -> Turn:
        """As `Side`."""
        return Turn(**self._process.ask(reader=self._name, batches=num_batches))


def note_missing(python: str | None) -> None:
    """Say how to get the rows that a table lacks."""
    if python is None:
        print("without litdata and mosaicml-streaming: benchmarks/peers.py tells how to get them")
    sys.stdout.flush()
