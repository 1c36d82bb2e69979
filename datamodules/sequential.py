"""Bytes that come one after the other: the output of a command, a file that is read in ranges."""

import io
import os
import select
import signal
import subprocess
from collections.abc import Callable
from typing import Any


class Ranges(io.RawIOBase):
    """A file of which ranges can be asked for.

    Args:
        read: gives the bytes from one offset to another.
        size: of the file, in bytes.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read, self._size, self._position = read, size, 0

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Read what comes next into a buffer, as much as fits."""
        stop = min(self._position + len(buffer), self._size)
        if stop == self._position:
            return 0
        content = self._read(self._position, stop)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


class Command(io.RawIOBase):
    """Output of a shell command; its end raises OSError if the command failed.

    `webdataset.gopen` starts commands as well; it neither limits them in time nor ends what they
    started in turn.

    Args:
        command: for the shell.
        timeout_s: to wait for the next output.
    """

    def __init__(self, command: str, timeout_s: float) -> None:
        self._command, self._timeout_s = command, timeout_s
        self._process = subprocess.Popen(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
            bufsize=0,
        )
        assert self._process.stdout is not None
        self._output = self._process.stdout
        self._poll = select.poll()  # unlike select, takes descriptors above 1024
        self._poll.register(self._output, select.POLLIN)

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Read what there is into a buffer; waits for it.

        Raises:
            OSError: the command failed, or gives nothing.
        """
        if not self._poll.poll(self._timeout_s * 1000):
            raise TimeoutError(f"no output of `{self._command}` for {self._timeout_s} s")
        size = os.readv(self._output.fileno(), [buffer])
        if size == 0 and (status := self._process.wait(self._timeout_s)):
            raise OSError(f"`{self._command}` ended with status {status}")
        return size

    def close(self) -> None:
        """End the command and all that it started."""
        if not self.closed:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            self._output.close()
        super().close()
