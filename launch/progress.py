"""A bar for what reads or writes many bytes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

LONG = 2**28
"""Bytes from which on there is one: some tenths of a second of reading."""


@contextmanager
def byte_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar, if `total` bytes take long; gives a function to tell how many more are done."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, TimeRemainingColumn(), disable=total < LONG) as progress:
        bar = progress.add_task(title, total=total)
        yield lambda count: progress.advance(bar, count)
