"""`cluster=slurm` outside of an allocation: the run as a job of Slurm's, by submitit.

What is submitted is the configuration as it was composed, so that a job that waits for hours is
the one that was asked for. In the job each task is one rank, as if `srun` had started it.
"""

import json
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from launch import job_script, runtime, slurm_jobs
from launch.last_line import say_end
from launch.run_directory import RunDirectory, StoppedError
from launch.run_home import directory_of
from launch.signals import holding_signals, noticing_signals
from launch.summary import print_summary
from trainers.durable_files import write_atomically

REFUSALS = (
    ("partition", "Invalid partition", "use one of {partitions}"),
    ("account", "Invalid account", "`sacctmgr show associations user=$USER` lists yours"),
    ("qos", "Invalid qos", "`sacctmgr show qos` lists them"),
    ("constraint", "Invalid feature", "`sinfo --format='%R %f'` lists the features of nodes"),
    ("time_minutes", "time limit", "`sinfo --format='%R %l'` lists the partitions' limits"),
)
"""Keys, how sbatch begins to say that it does not like their values, and what helps."""


@dataclass(frozen=True)
class Rank:
    """What a task of the job does: submitit pickles this, and calls it there."""

    config: str

    def __call__(self) -> None:
        """Train, and end the process as `launch.train` does: a run that fails is a failed job."""
        from launch.train import train

        config = OmegaConf.create(self.config)
        assert isinstance(config, DictConfig)
        began = time.time()
        # in place of submitit's handlers of signals, too, which know nothing of saving
        code, problem = runtime.outcome_of(lambda: train(config), "train")
        say_end(runtime.Ending(config, began, code, problem))
        sys.exit(code)


def submit(config: DictConfig) -> int:
    """Submit the run; with `cluster.dry_run=true` print the job's script instead.

    All that can be checked without a device and without preparing data is checked before.

    Returns:
        The exit code: 0 once it is submitted, or is done; with `cluster.wait=true` the run's.

    Raises:
        ValueError: The run, or the job, cannot be as asked.
    """
    run, rank = directory_of(config), Rank(OmegaConf.to_yaml(config))
    _plan(config)
    executor = _executor(config, run.path / "logs" / "slurm")
    if config.cluster.dry_run:
        print(executor.script())
        return runtime.DONE
    if shutil.which("sbatch") is None:
        raise ValueError(
            "cluster=slurm -> there is no `sbatch` on this machine -> run it where jobs are "
            "submitted, or leave cluster=slurm out to train here"
        )
    with run.lock():
        _refuse_changes(run, config)
        if run.is_done(config):
            print_summary(run)
            return runtime.DONE
        _refuse_second_job(run)
        before = run.status
        with noticing_signals():  # a job that is in the queue is one that is noted and told of
            (job,) = _submit(executor, [rank], config)
            _note_job(run, job, run.path.name)
            tasks = f"{config.cluster.nodes} node(s) with {config.trainer.devices} rank(s) each"
            print(f"run {run.path.name}: submitted as job {job.job_id}, {tasks}")
            print(f"follow: {_follow_command(job.paths.stdout)}")
            print(f"cancel: scancel {job.job_id}", flush=True)
    log = Path(job.paths.stdout)
    return _wait(run, job.job_id, log, before) if config.cluster.wait else runtime.DONE


def submit_array(name: str, configs: Sequence[DictConfig], folder: Path, at_once: int) -> list[str]:
    """Submit several runs as one array of jobs, which all ask Slurm for the same.

    Args:
        name: Of the array.
        configs: Of the runs.
        folder: Where the script and the output of the jobs go.
        at_once: How many of them may run at a time.

    Returns:
        The jobs' numbers, `<array>_<index>`.

    Raises:
        ValueError: A run, or the array, cannot be as asked.
    """
    ranks = [Rank(OmegaConf.to_yaml(config)) for config in configs]
    runs, asked = [check_run(config) for config in configs], []
    for config in configs:
        asked.append(job_script.parameters(config) | {"job_name": name})
        if asked[0] != asked[-1]:
            other = next(key for key in asked[0] if asked[0][key] != asked[-1][key])
            raise ValueError(
                f"run.name={config.run.name} -> it asks for {other}={asked[-1][other]}, and the "
                f"first job of this array for {asked[0][other]} -> submit it by itself"
            )
    executor = _executor(configs[0], folder)
    executor.update_parameters(job_name=name, array_parallelism=at_once)
    jobs = _submit(executor, ranks, configs[0])
    for run, job in zip(runs, jobs, strict=True):
        _note_job(run, job, name)
    return [job.job_id for job in jobs]


def check_run(config: DictConfig) -> RunDirectory:
    """Check what can be, of a run that is to wait in a queue.

    Raises:
        ValueError: It cannot be as asked.
    """
    _plan(config)
    run = directory_of(config)
    with run.lock():
        _refuse_changes(run, config)
        _refuse_second_job(run)
    return run


def _plan(config: DictConfig) -> None:
    """Check what the run is, and fill in its plan, as the ranks will."""
    from trainers.batch_plan import plan_run
    from trainers.compat import check

    nodes, devices = config.cluster.nodes, config.trainer.devices
    if not isinstance(nodes, int):
        raise ValueError(
            f"cluster.nodes={nodes} -> a job has a fixed number of nodes -> give that number"
        )
    for note in check(config, nodes * devices):
        print(f"note: {note}", file=sys.stderr)
    config.plan = asdict(plan_run(config, world_size=nodes * devices))


def _executor(config: DictConfig, folder: Path) -> Any:
    try:
        import submitit
    except ImportError as error:
        raise ValueError(
            "cluster=slurm -> jobs are submitted by submitit, which is missing -> "
            "pip install 'trainyard[slurm]'"
        ) from error

    class SlurmExecutor(submitit.SlurmExecutor):
        """Submitit's; also shows its script, without Slurm too."""

        @classmethod
        def affinity(cls) -> int:
            return 1

        def script(self) -> str:
            return self._make_submission_file_text(self._submitit_command_str, "")

    executor = SlurmExecutor(folder, python=job_script.python_command(config))
    executor.update_parameters(**job_script.parameters(config))
    return executor


def _refuse_changes(run: RunDirectory, config: DictConfig) -> None:
    """Compare the configuration with the run's before it waits in a queue.

    What the nodes will find out, facts of the data and the precision, is taken to be as it was.
    """
    if (run.path / "config.yaml").exists():
        config = config.copy()
        config.data = run.config.data
        if config.precision == "auto":
            config.precision = run.config.precision
    run.compare(config)


def _refuse_second_job(run: RunDirectory) -> None:
    if not (run.path / "job.json").exists():
        return
    noted = json.loads((run.path / "job.json").read_text())
    job = slurm_jobs.look_up(noted["job"])
    # Numbers begin anew now and then, and clusters that share a home count for themselves.
    if job and job.name == noted["name"] and not job.is_over:
        raise ValueError(
            f"run.name={run.path.name} -> it is job {noted['job']} already, {job} -> follow it by "
            f"`{_follow_command(noted['log'])}`, end it by `scancel {noted['job']}`, or choose "
            "another run.name"
        )


def _note_job(run: RunDirectory, job: Any, name: str) -> None:
    noted = {"job": job.job_id, "name": name, "log": str(job.paths.stdout)}
    write_atomically(run.path / "job.json", json.dumps(noted) + "\n")


def _submit(executor: Any, ranks: list[Rank], config: DictConfig) -> list[Any]:
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        with (
            holding_signals(),  # Ctrl-C in a terminal comes to sbatch, too, which would fall silent
            _leaving_nothing_in(executor.folder),
            redirect_stderr(StringIO()),  # submitit prints what sbatch says, and raises it too
            executor.batch(),  # is submitted at its end
        ):
            return [executor.submit(rank) for rank in ranks]
    except (FailedJobError, FailedSubmissionError) as error:
        raise ValueError(_explain(str(error), config)) from error


@contextmanager
def _leaving_nothing_in(folder: Path) -> Iterator[None]:
    """Remove what a submission that fails has written."""
    before = set(folder.glob("*"))
    try:
        yield
    except BaseException:
        for path in set(folder.glob("*")) - before:
            path.unlink()
        raise


def _explain(refusal: str, config: DictConfig) -> str:
    """Say which key sbatch does not like, as far as its words tell."""
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in refusal.splitlines()]
    said = f"sbatch: {'; '.join(filter(None, lines))}"
    for key, words, remedy in REFUSALS:
        if words.lower() in said.lower():
            if "{partitions}" in remedy:
                remedy = remedy.format(partitions=", ".join(slurm_jobs.partitions()))
            return f"cluster.{key}={config.cluster[key]} -> {said} -> {remedy}"
    return f"cluster=slurm -> {said} -> mend that; cluster.dry_run=true shows what was asked for"


def _follow_command(log: str | Path) -> str:
    return f"tail -F {shlex.quote(str(log))}"


def _wait(run: RunDirectory, job_id: str, log: Path, before: dict[str, Any]) -> int:
    """Wait for the job; its run's status, if it has written any, tells how it ended."""
    try:
        job = slurm_jobs.follow(job_id, log)
    except StoppedError as reason:
        print(f"{reason}: no longer waiting for job {job_id}, which goes on", file=sys.stderr)
        return runtime.PREEMPTED
    status = run.status if run.status != before else {}
    codes = {"done": runtime.DONE, "preempted": runtime.PREEMPTED}
    code = codes.get(status.get("state", ""), runtime.FAILED)
    if code == runtime.FAILED:
        why = status.get("reason") or "the run has not begun"
        print(f"error: job {job_id} ended: {job}; {why} (all of it: {log})", file=sys.stderr)
    return code
