"""A sweep over rates, looked at by its record while it goes on."""

from collections.abc import Sequence
from pathlib import Path

from launch.sweep_record import Job, Sweep
from trainers.metrics import read_metrics


class WatchedSweep:
    """What the record and the runs of a sweep say.

    Args:
        folder: Of the sweep.
        key: That is swept.
        values: Of it, in the order of the jobs.
    """

    def __init__(self, folder: Path, key: str, values: Sequence[str]):
        self.folder, self.key, self.values = folder, key, values

    def jobs(self) -> list[Job]:
        """Those that are known by now."""
        known = {job.values[self.key]: job for job in Sweep.read(self.folder).jobs.values()}
        return [known[value] for value in self.values if value in known]

    def states(self) -> list[str]:
        """Of the jobs."""
        return [job.state for job in self.jobs()]

    def step_of(self, number: int) -> int:
        """The last step that a job has logged; 0 before."""
        jobs = self.jobs()
        rows = read_metrics(f"{jobs[number].directory}/metrics.jsonl") if jobs else []
        return int(rows[-1]["step"]) if rows else 0
