"""While something goes on that a request to stop may not interrupt."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from launch.run_directory import StoppedError
from launch.runtime import STOP_SIGNALS


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let requests to stop wait for nothing: what goes on is what they would ask for.

    Ctrl-C still ends it. Other threads than the main one get no signals anyway.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    requests = STOP_SIGNALS - {signal.SIGINT}
    before = {each: signal.signal(each, signal.SIG_IGN) for each in requests}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def noticing_signals() -> Iterator[list[int]]:
    """Collect requests to stop instead of being interrupted by them.

    Of those after the first only Ctrl-C counts: who presses it again means it, while schedulers
    repeat themselves.

    Raises:
        StoppedError: There was one; at the end.
    """
    signals: list[int] = []

    def notice(number: int, frame: object) -> None:
        if not signals or number == signal.SIGINT:
            signals.append(number)

    before = {each: signal.signal(each, notice) for each in STOP_SIGNALS}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if signals:
        raise StoppedError(signal.Signals(signals[0]).name)


@contextmanager
def holding_signals() -> Iterator[None]:
    """Keep requests to stop from this thread, and from programs that it starts, until the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
