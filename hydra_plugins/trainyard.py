"""What Hydra needs to know of sweeps: it takes plugins from this namespace package only.

Every program that uses Hydra in this environment imports this, so nothing of ours is imported here.
"""

from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper


class GridSweeper(BasicSweeper):
    """Hydra's own, which leaves it to the launcher to say which jobs do not compose."""

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Do nothing: a job that does not compose is one that fails."""


class OptunaSweeper(Sweeper):
    """That of hydra-optuna-sweeper, given its sampler by Hydra 1.3, as its own entry is by 1.4."""

    def __init__(self, **settings: Any):
        """Take what `hydra/sweeper: optuna` holds, the sampler made of it."""
        from hydra_plugins.hydra_optuna_sweeper._impl import OptunaSweeperImpl

        self.sweeper = OptunaSweeperImpl(**settings)

    def setup(self, **context: Any) -> None:
        """Make the launcher."""
        self.sweeper.setup(**context)

    def sweep(self, arguments: list[str]) -> None:
        """Ask Optuna for jobs, run them, and tell it their objectives."""
        self.sweeper.sweep(arguments)


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
