"""Prepare: text to tar shards, an index and a tokenizer."""

from hydra.utils import instantiate
from omegaconf import DictConfig

from launch import runtime


def prepare(config: DictConfig) -> None:
    """Prepare the configured corpus, or finish doing so, and print what is there."""
    prepared = instantiate(config.corpus).prepare(config.data_dir)
    prepared.print_summary()


main = runtime.verb("prepare")(prepare)

if __name__ == "__main__":
    main()
