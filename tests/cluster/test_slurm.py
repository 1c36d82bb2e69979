"""Runs as jobs of a real Slurm cluster: whatever happens to them, they end as if nothing had.

Each run has two nodes with a rank on each. It is disturbed when it has come to a step, goes on in a
second launch, and is compared with a run on this machine alone that was left in peace: the same
samples in the same order, the same losses at every step, and the same weights to the last bit.
"""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor, equal

from launch.run_directory import RunDirectory
from tests.cluster.journal import Samples, read_launches, what_counts
from tests.cluster.slurm_cluster import ENDED, ROOT, SlurmCluster, wait_until
from tests.cluster.wandb_files import history_steps
from trainers.checkpoint import load_weights
from trainers.metrics import read_metrics

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1800)]

SCRIPT = ROOT / "launch" / "slurm" / "train.sbatch"
NUM_STEPS = 20
DISTURBED_AT = 7
"""Steps from the sixth on are slow in a first launch; the fifth is saved."""
HIGHER = Path(__file__).parent / "higher.sbatch"
SHAPE = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]


@dataclass
class Run:
    """A run, its job if it is one, and what is asserted of it."""

    directory: RunDirectory
    cluster: SlurmCluster | None = None
    job: str = ""

    @property
    def launches(self) -> list[Samples]:
        return read_launches(self.directory.path / "journal")

    @property
    def losses(self) -> list[tuple[int, float]]:
        rows = read_metrics(self.directory.path / "metrics.jsonl")
        return [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]

    @property
    def weights(self) -> dict[str, Tensor]:
        checkpoint = self.directory.find_checkpoint("last")
        assert checkpoint and checkpoint.name == f"step-{NUM_STEPS:08d}"
        return load_weights(checkpoint)

    @property
    def wandb(self) -> list[Path]:
        return sorted((self.directory.path / "wandb").glob("offline-run-*"))

    @property
    def wandb_id(self) -> str:
        return json.loads((self.directory.path / "wandb.json").read_text())["id"]

    @property
    def step(self) -> int:
        losses = self.losses
        return losses[-1][0] if losses else 0

    def wait_for_step(self, step: int) -> None:
        def is_there() -> bool:
            assert self.cluster and self.cluster.state(self.job) not in ENDED, "it has ended"
            return self.step >= step

        wait_until(is_there, f"step {step} of {self.directory.path}")


@pytest.fixture(scope="module")
def settings(small_settings, tmp_path_factory):
    """Overrides of a run by its name."""
    runs = tmp_path_factory.mktemp("runs")

    def settings_of(name: str, linger_s: float) -> list[str]:
        journal = f"_target_: tests.cluster.journal.Journal, folder: {runs / name / 'journal'}"
        return [
            *small_settings,
            f"runs_dir={runs}",
            f"run.name={name}",
            f"max_steps={NUM_STEPS}",
            "logger=wandb",
            "trainer.timeout_s=20",  # a rank that is cut off has ended before Slurm notices
            f"+trainer.callbacks.journal={{{journal}, linger_s: {linger_s}}}",
        ]

    settings_of.runs = runs  # pyright: ignore[reportFunctionMemberAccess]
    return settings_of


@pytest.fixture(scope="module")
def local(settings, command):
    """The undisturbed run of a strategy, by this machine alone."""
    done: dict[str, Run] = {}

    def run_locally(strategy: str) -> Run:
        if strategy not in done:
            name = f"local-{strategy}"
            overrides = [*settings(name, 0), f"strategy={strategy}", "trainer.devices=2"]
            subprocess.run(command("train", *overrides), check=True)
            done[strategy] = Run(RunDirectory(settings.runs / name))
        return done[strategy]

    return run_locally


@pytest.fixture(scope="module")
def submit(cluster, settings):
    """Submit a run of two nodes by its name: `submit("name", "ddp", options of sbatch)`."""

    def submit_run(name: str, strategy: str, *options: str, linger_s: float = 1) -> Run:
        overrides = [*settings(name, linger_s), f"strategy={strategy}"]
        job = cluster.submit(SCRIPT, *overrides, options=[*SHAPE, *options])
        return Run(RunDirectory(settings.runs / name), cluster, job)

    return submit_run


@pytest.fixture(scope="module")
def limited(submit):
    """A run that does not fit into its time limit; begun before the others, since it takes longest.

    Slurm looks at limits every half minute, so that the signal comes 60 to 90 s after the start.
    """
    run = submit("limited", "ddp", "--time=2", "--signal=USR1@30", linger_s=6)
    run.wait_for_step(1)
    return run


def assert_as_if_undisturbed(run: Run, local: Run) -> None:
    assert what_counts(run.launches) == what_counts(local.launches)
    assert [step for step, _ in run.losses] == [*range(1, NUM_STEPS + 1)]
    assert run.losses == local.losses
    weights, others = run.weights, local.weights
    assert weights.keys() == others.keys()
    assert all(equal(weights[name], others[name]) for name in weights)
    assert {path.name.rpartition("-")[2] for path in run.wandb} == {run.wandb_id}


def assert_no_step_is_lost_or_repeated(run: Run, num_launches: int) -> None:
    steps = [[*launch] for launch in run.launches]
    assert len(steps) == num_launches
    assert sum(steps, []) == [*range(1, NUM_STEPS + 1)]
    assert [history_steps(path) for path in run.wandb] == steps


def test_job_of_two_nodes_trains_as_two_ranks_here(slurm, limited, submit, local):
    run = submit("undisturbed", "ddp", linger_s=0)
    slurm.wait_for(run.job, "COMPLETED")
    assert_as_if_undisturbed(run, local("ddp"))
    assert_no_step_is_lost_or_repeated(run, num_launches=1)


def test_requeued_job_goes_on_where_it_was_stopped(slurm, submit, local):
    run = submit("requeued", "zero2")
    run.wait_for_step(DISTURBED_AT)
    slurm.requeue(run.job)
    slurm.wait_for(run.job, "COMPLETED")
    assert_as_if_undisturbed(run, local("zero2"))
    assert_no_step_is_lost_or_repeated(run, num_launches=2)


def test_run_saves_before_its_time_limit_and_asks_for_more(slurm, limited, local):
    slurm.wait_for(limited.job, "COMPLETED")
    assert_as_if_undisturbed(limited, local("ddp"))
    assert_no_step_is_lost_or_repeated(limited, num_launches=2)


@pytest.mark.parametrize("signal", ["USR1", "TERM"])
def test_preempted_job_goes_on_after_the_one_of_higher_rank(slurm, submit, local, signal):
    run = submit(f"preempted-{signal}", "ddp", f"--signal={signal}@5")
    run.wait_for_step(DISTURBED_AT)
    higher = slurm.submit(HIGHER, options=["--partition=high", "--nodes=2", "--exclusive"])
    slurm.wait_for(higher, "COMPLETED")
    slurm.wait_for(run.job, "COMPLETED")
    assert_as_if_undisturbed(run, local("ddp"))
    assert_no_step_is_lost_or_repeated(run, num_launches=2)


@pytest.mark.parametrize("node", ["node1", "node2"])
def test_run_survives_the_crash_of_a_node(slurm, submit, local, node):
    run = submit(f"crashed-{node}", "fsdp")
    run.wait_for_step(DISTURBED_AT)
    slurm.crash(node)
    slurm.wait_for(run.job, "PENDING")
    slurm.heal()
    slurm.wait_for(run.job, "COMPLETED")
    assert_as_if_undisturbed(run, local("fsdp"))


@pytest.mark.parametrize("node", ["node1", "node2"])
def test_run_survives_the_cut_of_a_link(slurm, submit, local, node):
    run = submit(f"cut-{node}", "ddp")
    run.wait_for_step(DISTURBED_AT)
    slurm.cut(node)
    slurm.wait_for(run.job, "PENDING")
    wait_until(lambda: not any("launch.train" in program for program in slurm.programs(node)), "rank")
    slurm.heal()
    slurm.wait_for(run.job, "COMPLETED")
    assert_as_if_undisturbed(run, local("ddp"))
