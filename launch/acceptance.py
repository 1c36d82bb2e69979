"""What happens to a run before it trains: rank 0 prepares and accepts it, the others follow."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from omegaconf import DictConfig

from launch.cluster import count_ranks, is_rank
from launch.completion import complete, fill_in
from launch.meeting import Meeting, wait_until
from launch.run_directory import RunDirectory
from launch.run_home import home_of
from launch.start_facts import facts_of_data, facts_of_start
from launch.summary import print_summary


@contextmanager
def accepted(run: RunDirectory, config: DictConfig, meeting: Meeting) -> Iterator[bool]:
    """Make a run ready to train here, and hold it; gives whether there is nothing left to train.

    Raises:
        ValueError: It may not be trained like this.
    """
    meeting.compare("start", facts_of_start(config))
    with (_lead if meeting.is_first else _follow)(run, config, meeting) as is_done:
        yield is_done


@contextmanager
def _lead(run: RunDirectory, config: DictConfig, meeting: Meeting) -> Iterator[bool]:
    home = home_of(run, config)
    num_ranks = count_ranks(config)
    # Importing Lightning takes seconds, and ranks that are started next do it themselves.
    (complete if num_ranks == 1 or is_rank() else fill_in)(config, num_ranks)
    with run.lock(), run.noting_failed_start():
        home.pull(str(config.checkpoint), trains=True)
        run.compare(config)
        run.go_back_to(str(config.checkpoint), config.resume.verify)
        is_done = run.is_done(config)
        if not is_done:
            run.verify_checkpoint("last", config.resume.verify)
            run.continuation(config)  # refuses what cannot be carried over
            run.accept(config)
            home.push_small_files()
        meeting.tell({"is_done": is_done, "last": _last(run)})
        if is_done:
            home.push()
            print_summary(run)
            yield True
            return
        meeting.compare("data", facts_of_data(config))
        meeting.adjourn()
        with home.completed_at_end(), run.noting_failed_start():
            yield False


@contextmanager
def _follow(run: RunDirectory, config: DictConfig, meeting: Meeting) -> Iterator[bool]:
    word: dict[str, Any] = meeting.hear()
    if word["is_done"]:
        yield True
        return
    complete(config, count_ranks(config))
    meeting.compare("data", facts_of_data(config))
    meeting.adjourn()
    home, last = home_of(run, config), word["last"]
    home.pull(str(config.checkpoint), trains=True)
    wait_until(lambda: _last(run) == last, f"{run.path} with {last or 'no checkpoint'}")
    with home.completed_at_end(), run.noting_failed_start():
        yield False


def _last(run: RunDirectory) -> str | None:
    """Name of the run's newest checkpoint, once all of it is there."""
    path = None
    with suppress(ValueError):  # its name may be there before its folder
        path = run.find_checkpoint("last")
    return path.name if path and (path / "manifest.json").exists() else None
