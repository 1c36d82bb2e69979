"""Prepare: text to tar shards, an index and a tokenizer; an index for shards that exist."""

from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from launch import runtime


def prepare(config: DictConfig) -> None:
    """Do what the configuration asks for, and print what is there.

    With `index` write an index for shards of others, with `inspect` check a data set; else prepare
    the configured corpus, or finish doing so.

    Raises:
        ValueError: two of these are asked for at once, or an index is to go somewhere where none
            is written.
    """
    if (config.index and config.inspect) or (config.out and not config.index):
        raise ValueError(
            f"index={config.index} inspect={config.inspect} out={config.out} -> out belongs to "
            "index, and inspect stands alone -> give one of the two"
        )
    if config.inspect:
        _call("inspection.inspect_data", path=config.inspect, num_processes=config.num_processes)
    elif config.index:
        source = OmegaConf.to_container(config)["index"]  # pyright: ignore
        folder = _call(
            "foreign.index_shards",
            source=source,
            out=config.out,
            num_processes=config.num_processes,
        )
        _call("inspection.print_data", path=folder)
    else:
        instantiate(config.corpus).prepare(config.data_dir).print_summary()


def _call(name: str, **arguments: Any) -> Any:
    return instantiate({"_target_": f"datamodules.{name}", **arguments})


main = runtime.verb("prepare")(prepare)

if __name__ == "__main__":
    main()
