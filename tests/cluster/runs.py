"""What a run leaves, for two of them to be compared; and a run that is a job of Slurm's."""

import json
from pathlib import Path

from torch import Tensor, equal

from launch.run_directory import RunDirectory
from tests.cluster.journal import Samples, read_launches, what_counts
from tests.cluster.slurm_cluster import ENDED, SlurmCluster, wait_until
from tests.cluster.wandb_files import history_steps
from trainers.checkpoint import load_weights, read_last
from trainers.metrics import read_metrics


class Run:
    """A run and what it has left.

    Args:
        path: The run directory, with a journal in it.
    """

    def __init__(self, path: Path):
        self.path = path

    @property
    def launches(self) -> list[Samples]:
        """What each launch was trained on."""
        return read_launches(self.path / "journal")

    @property
    def losses(self) -> dict[int, float]:
        """Training loss by step, in the order of the rows."""
        rows = read_metrics(self.path / "metrics.jsonl")
        return {int(row["step"]): row["train/loss"] for row in rows if "train/loss" in row}

    @property
    def weights(self) -> dict[str, Tensor]:
        """Those of the last checkpoint."""
        path = RunDirectory(self.path).find_checkpoint("last")
        assert path, f"{self.path} has saved nothing"
        return load_weights(path)

    @property
    def wandb_id(self) -> str:
        """The id that the run keeps."""
        return json.loads((self.path / "wandb.json").read_text())["id"]

    @property
    def wandb_steps(self) -> list[list[int]]:
        """The steps of the rows that each launch has given to the one run of W&B."""
        folders = sorted((self.path / "wandb").glob("offline-run-*"))
        assert all(f"-{self.wandb_id}" in folder.name for folder in folders), folders
        return [history_steps(folder) for folder in folders]


class Job(Run):
    """A run that is a job of Slurm's.

    Args:
        path: The run directory.
        cluster: Where it runs.
        number: The job's.
    """

    def __init__(self, path: Path, cluster: SlurmCluster, number: str):
        super().__init__(path)
        self.cluster, self.number = cluster, number

    def wait_for_step(self, step: int) -> None:
        """Wait until a step is logged.

        Raises:
            AssertionError: The job has ended before.
        """

        def is_there() -> bool:
            assert self.cluster.state(self.number) not in ENDED, "the job has ended too early"
            return max(self.losses, default=0) >= step

        wait_until(is_there, f"step {step} of {self.path}")

    def wait_for_save(self) -> None:
        """Wait until there is a checkpoint to continue from."""
        wait_until(lambda: read_last(self.path / "checkpoints") is not None, "a checkpoint")

    def finish(self) -> None:
        """Wait until the job has done its work."""
        self.cluster.wait_for(self.number, "COMPLETED")


def assert_same_training(one: Run, other: Run, num_steps: int) -> None:
    """Both have trained on the same samples in the same order, with the same losses and weights."""
    assert what_counts(one.launches) == what_counts(other.launches)
    assert [*one.losses] == [*range(1, num_steps + 1)]
    assert one.losses == other.losses
    weights, others = one.weights, other.weights
    assert weights.keys() == others.keys()
    different = [name for name in weights if not equal(weights[name], others[name])]
    assert not different, f"weights differ: {different}"
