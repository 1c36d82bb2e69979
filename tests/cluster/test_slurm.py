"""Runs as jobs of a real Slurm cluster: whatever happens to them, they end as if nothing had.

Each run has two nodes with a rank on each. It is disturbed when it has come to a step, goes on in a
second launch, and is compared with a run on this machine alone that was left in peace: the same
samples in the same order, the same losses at every step, and the same weights to the last bit.
"""

import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

from tests.cluster.runs import Job, Run, assert_same_training
from tests.cluster.slurm_cluster import ROOT, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1800)]

SCRIPT = ROOT / "launch" / "slurm" / "train.sbatch"
NUM_STEPS = 20
DISTURBED_AT = 7
"""Steps from the sixth on are slow in a first launch; the fifth is saved."""
HIGHER = Path(__file__).parent / "higher.sbatch"
SHAPE = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]


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
            "trainer.timeout_s=20",  # how long a rank waits for one that is cut off
            f"+trainer.callbacks.journal={{{journal}, linger_s: {linger_s}}}",
        ]

    settings_of.runs = runs  # pyright: ignore[reportFunctionMemberAccess]
    return settings_of


@pytest.fixture(scope="module")
def local(settings):
    """The undisturbed run of a strategy, by this machine alone."""
    done: dict[str, Run] = {}

    def run_locally(strategy: str) -> Run:
        if strategy not in done:
            name = f"local-{strategy}"
            overrides = [*settings(name, 0), f"strategy={strategy}", "trainer.devices=2"]
            train = [sys.executable, "-m", "launch.train", *overrides]
            subprocess.run(train, check=True, cwd=ROOT)
            done[strategy] = Run(settings.runs / name)
        return done[strategy]

    return run_locally


@pytest.fixture(scope="module")
def submit(cluster, settings):
    """Submit a run of two nodes by its name: `submit("name", "ddp", options of sbatch)`."""

    def submit_run(name: str, strategy: str, *options: str, linger_s: float = 1) -> Job:
        overrides = [*settings(name, linger_s), f"strategy={strategy}"]
        number = cluster.submit(SCRIPT, *overrides, options=[*SHAPE, *options])
        return Job(settings.runs / name, cluster, number)

    return submit_run


@pytest.fixture(scope="module")
def limited(submit):
    """A run that does not fit into its time limit; begun before the others, since it takes longest.

    Slurm looks at limits every half minute, so that the signal comes 60 to 90 s after the start.
    """
    run = submit("limited", "ddp", "--time=2", "--signal=USR1@30", linger_s=6)
    run.wait_for_step(1)
    return run


def is_training(programs: list[str]) -> bool:
    """Whether a rank is among them; `srun`, which names the same program, lives on without it."""
    return any("python -m launch.train" in each for each in programs if not each.startswith("srun"))


def assert_launches(
    run: Run, num_launches: int, *, is_saved: bool = True, may_be_more: bool = False
) -> None:
    """Launches begin where those before them had stopped, or saved; W&B's one run has each step."""
    first, *others = [[*launch] for launch in run.launches]
    assert len(others) == num_launches - 1 or (may_be_more and len(others) >= num_launches)
    steps = first
    for later in others:
        assert 1 < later[0] <= steps[-1] + 1
        assert later[0] == steps[-1] + 1 or not is_saved
        steps = [*range(1, later[0]), *later]
    assert steps == [*range(1, NUM_STEPS + 1)]
    assert {*chain(*run.wandb_steps)} == {*steps}


def test_job_of_two_nodes_trains_as_two_ranks_here(slurm, limited, submit, local):
    run = submit("undisturbed", "ddp", linger_s=0)
    run.finish()
    assert_same_training(run, local("ddp"), NUM_STEPS)
    assert_launches(run, 1)


def test_requeued_job_goes_on_where_it_was_stopped(slurm, submit, local):
    run = submit("requeued", "ddp")
    run.wait_for_step(DISTURBED_AT)
    slurm.requeue(run.number)
    run.finish()
    assert_same_training(run, local("ddp"), NUM_STEPS)
    assert_launches(run, 2)


def test_run_saves_before_its_time_limit_and_asks_for_more(slurm, limited, local):
    limited.finish()
    assert_same_training(limited, local("ddp"), NUM_STEPS)
    assert_launches(limited, 2, may_be_more=True)  # on a busy machine the limit comes again


@pytest.mark.parametrize("signal", ["USR1", "TERM"])
def test_preempted_job_goes_on_after_the_one_of_higher_rank(slurm, submit, local, signal):
    run = submit(f"preempted-{signal}", "ddp", f"--signal={signal}@5")
    run.wait_for_step(DISTURBED_AT)
    higher = slurm.submit(HIGHER, options=["--partition=high", "--nodes=2", "--exclusive"])
    slurm.wait_for(higher, "COMPLETED")
    run.finish()
    assert_same_training(run, local("ddp"), NUM_STEPS)
    assert_launches(run, 2)


@pytest.mark.parametrize("node", ["node1", "node2"])
def test_run_survives_the_crash_of_a_node(slurm, submit, local, node):
    run = submit(f"crashed-{node}", "fsdp")
    run.wait_for_step(DISTURBED_AT)
    run.wait_for_save()
    slurm.crash(node)
    slurm.wait_for(run.number, "PENDING")
    slurm.heal()
    run.finish()
    assert_same_training(run, local("fsdp"), NUM_STEPS)
    assert_launches(run, 2, is_saved=False)


@pytest.mark.parametrize("node", ["node1", "node2"])
def test_run_survives_the_cut_of_a_link(slurm, submit, local, node):
    run = submit(f"cut-{node}", "ddp")
    run.wait_for_step(DISTURBED_AT)
    run.wait_for_save()
    slurm.cut(node)
    slurm.wait_for(run.number, "PENDING")
    wait_until(lambda: not is_training(slurm.programs(node)), f"the rank on {node} to end")
    slurm.heal()
    run.finish()
    assert_same_training(run, local("ddp"), NUM_STEPS)
    assert_launches(run, 2, is_saved=False)
