"""Sweeps: `python -m launch.train -m key=a,b ...`.

Hydra's sweepers (all combinations, or Optuna) choose the overrides of each job. This gives it a
name, leaves out what is finished, runs the rest, each as `python -m launch.train` in processes of
its own, and hands their objectives back.
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.errors import HydraException
from omegaconf import DictConfig, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from launch import cluster, runtime
from launch.resume_rules import FREE_KEYS, LENGTH_KEYS, is_within, refuse_changes
from launch.run_directory import RunDirectory
from launch.run_home import directory_of
from launch.sweep_processes import note_done, run_here
from launch.sweep_record import Job, Sweep, folder_of, name_of_run
from trainers.rules import is_submission

NO_IDENTITY = (*FREE_KEYS, *LENGTH_KEYS, "run.name")
"""What may change in a run, or a run itself refuses, makes no other job unless it is swept."""

DIRECTIONS = ("minimize", "maximize")


_started: list["Launches"] = []
"""The sweep of this process, if it has one: Hydra does not hand on what it has made."""


@contextmanager
def sweeps() -> Iterator[None]:
    """While Hydra runs, let `-m` run a sweep; after one, end the program with its exit code."""
    try:
        yield
    except ValueError:
        # Optuna looks for the best of none.
        if not (_started and _started[0].has_only_failures()):
            raise
    finally:
        ended, _started[:] = list(_started), []
        for each in ended:
            each.sweep.release()
    for each in ended:
        sys.exit(each.finish())


def open_sweep(config: DictConfig, loader: Any) -> "Launches":
    """Open the sweep that `config` describes; `sweeps` will end it."""
    _started.append(Launches(config, loader))
    return _started[0]


class Launches:
    """Starts the jobs of a sweep that are not finished, and keeps its record."""

    def __init__(self, config: DictConfig, loader: Any):
        """Open the record of the sweep that `config`, without what is swept, describes.

        Raises:
            ValueError: It cannot be run as asked.
        """
        _check(config)
        self.config, self.loader = config, loader
        self.sweep = Sweep.read(folder_of(config, str(config.sweep.name)))
        self.sweep.hold()
        self.sweep.objective = config.sweep.objective
        self.sweep.direction = config.sweep.direction
        given = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        last = {each.get_key_element(): each for each in given}
        self.fixed = {key for key, each in last.items() if not each.is_sweep_override()}
        self.asked: dict[str, Job] = {}
        with read_write(config), open_dict(config):  # where sweepers write files of their own
            config.hydra.sweep.dir = str(self.sweep.folder)
        for name in ("optuna", "hydra_plugins"):  # they tell what the lines of jobs do
            logging.getLogger(name).setLevel(logging.ERROR)

    def run(self, job_overrides: Sequence[Sequence[str]]) -> list[JobReturn]:
        """Run jobs until all have ended.

        Returns:
            For each its objective, or None if it has none.

        Raises:
            StoppedError: A signal asked to stop.
            ValueError: They cannot be run as asked.
        """
        setup_globals()
        jobs = [self._identify(overrides) for overrides in job_overrides]
        unique = {job.run: job for job in jobs}
        for job in jobs:
            if job.values != unique[job.run].values:
                raise ValueError(
                    f"run.name={job.run} -> jobs of other values have that name too -> sweep "
                    "run.name alone, or leave it to the sweep to name its runs"
                )
        self.asked |= unique
        self.sweep.jobs |= unique
        composed = [(job, self._compose(job)) for job in unique.values()]
        missing = [(job, config) for job, config in composed if config is not None]
        if missing:
            self.sweep.write()
            self._run(missing)
        return [_returned(unique[job.run]) for job in jobs]

    def finish(self) -> int:
        """Say how the sweep has ended; gives the exit code."""
        from launch.report import print_table

        print_table(self.sweep)
        states = [job.state for job in self.asked.values()]
        failed = [job for job in self.asked.values() if job.state == "failed"]
        for job in failed:
            print(f"failed: {job.run} {self.sweep.describe(job)}: {job.reason}")
        print(
            f"sweep {self.sweep.name}: {states.count('done')} of {len(states)} jobs done, "
            f"{len(failed)} failed; the output of each is in {self.sweep.folder}/<run>.log\n"
            f"as a picture: python -m launch.report sweep={self.sweep.name}{self._folders()}",
            flush=True,
        )
        if failed:
            return runtime.FAILED
        is_done = all(state == "done" for state in states)
        return runtime.DONE if is_done else runtime.PREEMPTED

    def _folders(self) -> str:
        names = ("runs_dir", "local_runs_dir")
        return "".join(f" {name}={self.config[name]}" for name in names if name in self.fixed)

    def has_only_failures(self) -> bool:
        """Whether jobs were run, and none gave an objective."""
        return bool(self.asked) and all(job.objective is None for job in self.asked.values())

    def _identify(self, overrides: Sequence[str]) -> Job:
        """The job of these overrides, as far as the record knows it."""
        pairs = [override.partition("=")[::2] for override in overrides]
        swept = [key for key, _ in pairs if key not in self.fixed]
        self.sweep.swept = list(dict.fromkeys([*self.sweep.swept, *swept]))
        values = {
            key: value for key, value in pairs if key in swept or not is_within(key, NO_IDENTITY)
        }
        run = values.get("run.name") or name_of_run(self.sweep.name, values)
        names = {"run.name": run, "sweep.name": self.sweep.name}
        given = [
            override
            for override, (key, _) in zip(overrides, pairs, strict=True)
            if key not in names
        ]
        given += [f"{key}={value}" for key, value in names.items()]
        known = self.sweep.jobs.get(run) or Job(run, values, given)
        return replace(known, values=values, overrides=given)

    def _compose(self, job: Job) -> DictConfig | None:
        """Compose a job's configuration; None where there is nothing to run, which is noted."""
        try:
            config = self.loader.load_sweep_config(self.config, job.overrides)
            with read_write(config), open_dict(config):
                del config["hydra"]
            if "group" in config.logger and config.logger.group is None:
                config.logger.group = self.sweep.name
                job.overrides.append(f"logger.group={self.sweep.name}")
            run = directory_of(config)
            is_finished = _is_finished(run, config)
        except (HydraException, OmegaConfBaseException) as error:
            reason = " ".join((runtime.explain(error, "train") or str(error)).split())
            self.sweep.note(job, "failed", reason=reason, objective=None)
            return None
        job.directory = str(run.path)
        if is_finished:
            note_done(self.sweep, job, job.seconds)
            return None
        job.state, job.reason, job.objective = "waiting", "", None
        return config

    def _run(self, missing: list[tuple[Job, DictConfig]]) -> None:
        at_once = self.config.sweep.jobs
        if is_submission(self.config):  # in an allocation jobs run there
            from launch.sweep_array import run_as_array

            run_as_array(self.sweep, missing, at_once)
            return
        hydra = self.config.hydra
        flags = [
            f"--config-dir={source.path}"
            for source in hydra.runtime.config_sources
            if source.provider == "command-line"
        ]
        if hydra.job.config_name != "train":
            flags.append(f"--config-name={hydra.job.config_name}")
        flags += [each for each in hydra.overrides.hydra if not each.startswith("hydra.mode=")]
        run_here(self.sweep, missing, flags, at_once)


def _check(config: DictConfig) -> None:
    if cluster.is_rank() or cluster.starter() != "somebody":
        raise ValueError(
            "-m -> each of the ranks that torchrun or srun has started would run the whole sweep "
            "-> start it by `python -m launch.train -m`; its jobs have ranks of their own"
        )
    if config.cluster.get("dry_run"):
        raise ValueError(
            "cluster.dry_run=true -> a sweep has no script of its own -> leave -m out and give "
            "one value of each key"
        )
    if config.sweep.direction not in DIRECTIONS:
        raise ValueError(
            f"sweep.direction={config.sweep.direction} -> unknown -> use {' or '.join(DIRECTIONS)}"
        )
    jobs = config.sweep.jobs
    if not isinstance(jobs, int) or jobs < 1:
        raise ValueError(f"sweep.jobs={jobs} -> no number of jobs at once -> give 1 or more")


def _is_finished(run: RunDirectory, config: DictConfig) -> bool:
    """Whether a job need not be started; where in doubt it is, and says so itself."""
    is_plain = config.checkpoint == "last" and not config.resume.extend
    if not is_plain or run.status.get("state") != "done":
        return False
    filled = config.copy()
    filled.data = run.config.data  # what only a start finds out is taken to be as it was
    if config.precision == "auto":
        filled.precision = run.config.precision
    try:
        refuse_changes(run.config, filled, str(run.path))
    except ValueError:
        return False
    return True


def _returned(job: Job) -> JobReturn:
    """What Hydra's sweepers are told; Optuna takes None for a job that has failed."""
    return JobReturn(
        overrides=job.overrides, status=JobStatus.COMPLETED, _return_value=job.objective
    )
