"""What a sweep has done: written down as jobs begin and end, and told while it goes on.

<runs_dir>/sweeps/<name>/
  sweep.json       every job: its overrides, run, state, objective, and why it failed
  <run>.log        what each job printed
  report.csv  report.png      of `python -m launch.report sweep=<name>`
"""

import fcntl
import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from launch.run_directory import RunDirectory
from launch.run_home import is_url

STATES = ("waiting", "running", "done", "preempted", "failed")


@dataclass(eq=False)
class Job:
    """One job of a sweep: a run, and what became of it."""

    run: str
    values: dict[str, str]
    """What makes it another run than others: its overrides by key."""
    overrides: list[str]
    """Of the command line that trains it."""
    directory: str = ""
    state: str = "waiting"
    objective: float | None = None
    steps: int | None = None
    seconds: float = 0.0
    """Of all its launches."""
    reason: str = ""
    slurm_job: str | None = None
    began: float = 0.0
    """Its last launch, and the run's status before that."""
    status_before: dict[str, Any] = field(default_factory=dict)


@dataclass
class Sweep:
    """The record of a sweep, in its folder."""

    folder: Path
    objective: str = ""
    direction: str = "minimize"
    swept: list[str] = field(default_factory=list)
    """The keys that were given several values so far."""
    jobs: dict[str, Job] = field(default_factory=dict)
    _lock: Any = None

    @property
    def name(self) -> str:
        """The sweep's name."""
        return self.folder.name

    @classmethod
    def read(cls, folder: Path) -> "Sweep":
        """What is recorded in `folder`; an empty record where nothing is."""
        path = folder / "sweep.json"
        written: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"jobs": []}
        jobs = {job["run"]: Job(**job) for job in written.pop("jobs")}
        return cls(folder, jobs=jobs, **written)

    def write(self) -> None:
        """Write the record, whole."""
        from trainers.durable_files import write_atomically

        jobs = [asdict(job) for job in self.jobs.values()]
        record = {
            "objective": self.objective,
            "direction": self.direction,
            "swept": self.swept,
            "jobs": jobs,
        }
        write_atomically(self.folder / "sweep.json", json.dumps(record, indent=1) + "\n")

    def hold(self) -> None:
        """Keep other processes from running this sweep, until `release` or the end of this one.

        Raises:
            ValueError: One does.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / ".lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ValueError(
                f"sweep.name={self.name} -> another process is running it ({self.folder}) -> wait "
                "for it, stop it, or choose another sweep.name"
            ) from error

    def release(self) -> None:
        """Let other processes run this sweep."""
        self._lock.close()

    def is_held(self) -> bool:
        """Whether a process runs this sweep now."""
        with suppress(FileNotFoundError), (self.folder / ".lock").open("r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return True
        return False

    @property
    def keys(self) -> list[str]:
        """What its jobs are told apart by: what is swept, and what else differs between them."""
        every = dict.fromkeys(key for job in self.jobs.values() for key in job.values)
        differing = [
            key for key in every if len({job.values.get(key) for job in self.jobs.values()}) > 1
        ]
        return list(dict.fromkeys([*self.swept, *differing]))

    def describe(self, job: Job) -> str:
        """What is particular to a job, by keys as short as they can be."""
        names = short_names(self.keys)
        given = [key for key in names if key in job.values]
        return " ".join(f"{names[key]}={job.values[key]}" for key in given)

    def log(self, job: Job) -> Path:
        """Where a job's output goes."""
        return self.folder / f"{job.run}.log"

    def note(self, job: Job, state: str, **facts: Any) -> None:
        """Write down what has become of a job, and say so in a line."""
        job.state = state
        for name, value in facts.items():
            setattr(job, name, value)
        self.write()
        text = "begins" if state == "running" else state
        if state == "done":
            text += f", {self.objective} {job.objective:.6g}"
        if state in ("done", "preempted", "failed") and job.seconds:
            text += f", {describe_seconds(job.seconds)}"
        if job.reason:
            text += f": {job.reason}"
        done = sum(each.state in ("done", "failed") for each in self.jobs.values())
        Console().print(
            f"[{done}/{len(self.jobs)}] {' '.join([job.run, self.describe(job)]).strip()}: {text}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def folder_of(config: DictConfig, name: str) -> Path:
    """Where the record of a sweep is: beside its runs, on the local disk."""
    local = config.local_runs_dir if is_url(config.runs_dir) else config.runs_dir
    return Path(local, "sweeps", name)


def name_of_run(sweep: str, values: dict[str, str]) -> str:
    """The same for the same values in any order."""
    text = "\n".join(sorted(f"{key}={value}" for key, value in values.items()))
    return f"{sweep}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def read_objective(run: RunDirectory, objective: str) -> float:
    """The last value that a finished run reports of its objective.

    Raises:
        ValueError: It reports none, or it is not finite.
    """
    summary = run.summary
    if (value := summary.get(objective)) is None:
        raise ValueError(
            f"sweep.objective={objective} -> run {run.path.name} reports no such value -> use one "
            f"of {', '.join(objectives_in(summary))}"
        )
    if not abs(value) < float("inf"):
        raise ValueError(f"{objective} of run {run.path.name} is {value} at its end")
    return float(value)


def objectives_in(summary: dict[str, Any]) -> list[str]:
    """Names of the values that runs can be compared by."""
    return [key for key, value in summary.items() if isinstance(value, int | float)]


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last parts of dotted keys, where that tells them apart; `name` tells nothing."""
    last = [".".join(key.split(".")[-2 if key.endswith(".name") else -1 :]) for key in keys]
    return {
        key: part if last.count(part) == 1 else key for key, part in zip(keys, last, strict=True)
    }


def describe_seconds(seconds: float) -> str:
    """As hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "min"), (rest, "s"))
    return " ".join(f"{number} {unit}" for number, unit in parts if number) or "0 s"
