"""Report: runs side by side, of a sweep or by name: a table, a CSV file and a picture."""

import csv
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from launch import runtime
from launch.resume_rules import FREE_KEYS, changed_keys, flatten, is_within
from launch.run_directory import RunDirectory
from launch.run_home import find_run, is_url
from launch.sweep_record import (
    Job,
    Sweep,
    describe_seconds,
    folder_of,
    objectives_in,
    short_names,
)

FACTS = ("state", "objective", "steps", "seconds", "run")
"""Columns after those of the keys."""


def report(config: DictConfig) -> None:
    """Print a table of the runs, best first, and write it as CSV and as a picture.

    Raises:
        ValueError: There are no such runs, or none of them has the objective.
    """
    if (config.sweep is None) == (config.run is None):
        raise ValueError(
            f"sweep={config.sweep} run={config.run} -> one of them says which runs -> give "
            "sweep=<name> or run=[<name>,<name>]"
        )
    sweep = _read_sweep(config) if config.sweep is not None else _collect_runs(config)
    sweep.direction = config.direction or sweep.direction
    if config.objective or config.run is not None:
        _take_objective(sweep, config.objective or sweep.objective)
    print_table(sweep)
    write_csv(sweep, sweep.folder / "report.csv")
    print(f"table: {sweep.folder / 'report.csv'}")
    if any(job.objective is not None for job in sweep.jobs.values()):
        from launch.parallel_coordinates import draw

        draw(sweep, sweep.folder / "report.png")
        print(f"picture: {sweep.folder / 'report.png'}")


def in_order(sweep: Sweep) -> list[Job]:
    """Its jobs, best first; those without an objective at the end."""
    sign = 1 if sweep.direction == "minimize" else -1

    def rank(job: Job) -> tuple[bool, float]:
        return job.objective is None, sign * (job.objective or 0.0)

    return sorted(sweep.jobs.values(), key=rank)


def print_table(sweep: Sweep) -> None:
    """Print the runs of a sweep, best first."""
    keys = sweep.keys
    names = short_names(keys)
    table = Table(*[names[key] for key in keys], title=sweep.name, title_justify="left")
    for name in ("state", sweep.objective, "steps", "time", "run"):
        is_name = name in ("state", "run")
        table.add_column(name, justify="left" if is_name else "right", no_wrap=name == "run")
    for job in in_order(sweep):
        table.add_row(
            *[_short(job.values.get(key, "")) for key in keys],
            job.state,
            "" if job.objective is None else f"{job.objective:.5g}",
            "" if job.steps is None else f"{job.steps:,}",
            describe_seconds(job.seconds) if job.seconds else "",
            job.run,
        )
    Console().print(table)


def write_csv(sweep: Sweep, path: Path) -> None:
    """Write the runs of a sweep, best first, with keys and values in full."""
    keys = sweep.keys
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*keys, *FACTS, "reason"])
        for job in in_order(sweep):
            values = [job.values.get(key, "") for key in keys]
            writer.writerow([*values, *(getattr(job, name) for name in FACTS), job.reason])


def _read_sweep(config: DictConfig) -> Sweep:
    folder = folder_of(config, str(config.sweep))
    if not (folder / "sweep.json").exists():
        known = sorted(path.parent.name for path in folder.parent.glob("*/sweep.json"))
        names = ", ".join(known) or "none yet: `python -m launch.train -m <key>=<a>,<b>` makes one"
        raise ValueError(
            f"sweep={config.sweep} -> no such sweep in {folder.parent}/ -> there are: {names}"
        )
    sweep = Sweep.read(folder)
    if not sweep.is_held():
        for job in sweep.jobs.values():
            if job.state == "running" and not job.slurm_job:
                job.state = "interrupted"  # with the sweep, which could not say so
    return sweep


def _collect_runs(config: DictConfig) -> Sweep:
    """The runs of `run=[...]`; their values are what their configurations differ in."""
    given = OmegaConf.to_container(config.run) if OmegaConf.is_list(config.run) else [config.run]
    runs = [find_run(str(each), config) for each in given]  # pyright: ignore[reportGeneralTypeIssues, reportOptionalIterable]
    first = runs[0].config
    differing = {
        key
        for run in runs[1:]
        for key in changed_keys(first, run.config)
        if not is_within(key, ("run.name", "data", *set(FREE_KEYS) - {"strategy"}))
    }
    name = "+".join(run.path.name for run in runs)
    local = config.local_runs_dir if is_url(config.runs_dir) else config.runs_dir
    folder = Path(local, "reports", name)
    folder.mkdir(parents=True, exist_ok=True)
    sweep = Sweep(folder, objective=first.checkpoints.monitor)
    for run in runs:
        flat = flatten(OmegaConf.to_container(run.config, resolve=False))
        values = {key: str(flat.get(key)) for key in sorted(differing)}
        sweep.jobs[run.path.name] = Job(run.path.name, values, [], directory=str(run.path))
        job = sweep.jobs[run.path.name]
        job.state = run.status.get("state", "waiting")
        job.steps = run.status.get("step")
    return sweep


def _take_objective(sweep: Sweep, objective: str) -> None:
    """Compare by another value of the summaries than the record has."""
    summaries = {
        name: RunDirectory(Path(job.directory)).summary for name, job in sweep.jobs.items()
    }
    if not any(objective in summary for summary in summaries.values()):
        known = dict.fromkeys(key for each in summaries.values() for key in objectives_in(each))
        raise ValueError(
            f"objective={objective} -> no finished run of {sweep.name} reports it -> use one of "
            f"{', '.join(known) or 'those that runs will report: none is finished'}"
        )
    sweep.objective = objective
    for name, summary in summaries.items():
        sweep.jobs[name].objective = summary.get(objective)


def _short(value: str) -> str:
    """A number of many digits with some of them."""
    try:
        return value if len(value) < 9 else f"{float(value):.4g}"
    except ValueError:
        return value


main = runtime.verb("report")(report)

if __name__ == "__main__":
    main()
