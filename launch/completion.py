"""What the launcher fills into a configuration before models and data are built."""

import os
from dataclasses import asdict

from hydra.utils import instantiate
from omegaconf import DictConfig

from launch.cluster import node_range


def refuse_impossible(config: DictConfig) -> None:
    """Check values one by one, and that the batch divides among all numbers of nodes there may be.

    What this machine has is checked once the ranks have met, where it does not concern one alone.

    Raises:
        ValueError: A value cannot be, or there is a number in `cluster.nodes=<min>:<max>` among
            which the batch does not divide; better now than when a node leaves.
    """
    from trainers.batch_plan import plan_run
    from trainers.limits import check_values

    check_values(config)
    fewest, most = node_range(config)
    devices = int(os.environ.get("LOCAL_WORLD_SIZE") or config.trainer.devices)
    for nodes in range(fewest, most + 1) if fewest < most else ():
        try:
            plan_run(config, world_size=nodes * devices)
        except ValueError as error:
            raise ValueError(
                f"cluster.nodes={fewest}:{most} may become {nodes}: {error}"
            ) from error


def complete(config: DictConfig, num_ranks: int) -> None:
    """Check it, prepare its data, fill in `plan` and `data`; on no device, on all ranks at once."""
    fill_in(config, num_ranks)
    check_datamodule(config)


def fill_in(config: DictConfig, num_ranks: int) -> None:
    """The same, but for the datamodule, which takes Lightning to be imported."""
    from trainers.batch_plan import plan_run
    from trainers.compat import check
    from trainers.limits import resolve_precision

    check(config, num_ranks)
    config.precision = resolve_precision(config)  # written down: another machine may choose another
    config.plan = asdict(plan_run(config, world_size=num_ranks))
    if "_target_" in config.corpus:
        config.data = instantiate(config.corpus).prepare(config.data_dir).facts


def check_datamodule(config: DictConfig) -> None:
    """Build and set up the datamodule: it refuses settings that cannot be, and unsuitable data."""
    datamodule = instantiate(config.datamodule, _convert_="all")
    if "_target_" in config.corpus:
        datamodule.setup("fit")
