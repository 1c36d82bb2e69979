"""Tasks in a pool of processes, under a progress bar; what only one process may do at a time."""

import fcntl
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn


class Task(Protocol):
    """What can be run in a pool: a picklable piece of work of a known size."""

    @property
    def num_bytes(self) -> int:
        """Bytes to work through, for the progress bar."""
        ...


T = TypeVar("T", bound=Task)
Result = TypeVar("Result")


def run_tasks(
    function: Callable[[T], Result],
    tasks: list[T],
    num_processes: int | None,
    title: str,
    *,
    done: Callable[[T], bool] = lambda task: False,
) -> dict[int, Result]:
    """Run a function on the tasks that are not done yet.

    Args:
        function: at the top level of its module.
        tasks: in order.
        num_processes: None takes a process per core; one works in this process.
        title: of the progress bar.
        done: tells which tasks an earlier call has left complete.

    Returns:
        Number of a task -> what the function returned, for those that were run, in order.
    """
    todo = {number: task for number, task in enumerate(tasks) if not done(task)}
    num_processes = min(num_processes or _count_cores(), len(todo))
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    results: dict[int, Result] = {}
    with Progress(*columns, TimeRemainingColumn()) as progress:
        bar = progress.add_task(title, total=sum(task.num_bytes for task in tasks))
        progress.advance(bar, sum(t.num_bytes for n, t in enumerate(tasks) if n not in todo))
        if num_processes <= 1:
            finished = ((number, function(task)) for number, task in todo.items())
        else:
            finished = _run_in_processes(function, todo, num_processes)
        for number, result in finished:
            results[number] = result
            progress.advance(bar, tasks[number].num_bytes)
    return dict(sorted(results.items()))


def _run_in_processes(
    function: Callable[[T], Result], tasks: dict[int, T], num_processes: int
) -> Iterator[tuple[int, Result]]:
    """Yield number and result of tasks as they are finished."""
    # Spawned, not forked: the tokenizers library has threads by now, and so may the caller.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, context, _start_process) as pool:
        futures: dict[Future[Result], int] = {
            pool.submit(function, task): number for number, task in tasks.items()
        }
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _count_cores() -> int:
    # Where the system can restrict a process to some cores, count those.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_process() -> None:
    """Make a worker process single-threaded, and end it with its parent."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, without a traceback

    def follow_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock that the system releases when its holder ends, in whatever way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.getLogger(__name__).info("waiting for another process that prepares the same")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
