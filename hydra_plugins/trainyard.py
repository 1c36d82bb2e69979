"""What Hydra needs to know of sweeps: it takes plugins from this namespace package only.

Every program that uses Hydra in this environment imports this, so nothing of ours is imported here.
"""

from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher


class GridSweeper(BasicSweeper):
    """Hydra's own, which leaves it to the launcher to say which jobs do not compose."""

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Do nothing: a job that does not compose is one that fails."""


class SweepLauncher(Launcher):
    """Runs the jobs of a sweep by `launch.sweep`."""

    def setup(self, *, config: Any, hydra_context: Any, **unused: Any) -> None:
        """Open the record of the sweep that `config`, without what is swept, describes."""
        from launch.sweep import open_sweep

        self.jobs = open_sweep(config, hydra_context.config_loader)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run jobs until all have ended; gives the objective of each, None where it has none."""
        return self.jobs.run(job_overrides)
