"""What a strategy keeps on a rank, in bytes per parameter, DeepSpeed's copies included."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Bytes:
    """Bytes per parameter of the model on one rank, between backward pass and optimizer step.

    Activations, communication buffers and the blocks that are gathered at the moment come on top;
    under ZeRO 3 parameters below `stage3_param_persistence_threshold`, which stay whole; and under
    ZeRO 1 whole gradients, 4 bytes, while the backward pass makes them.

    Attributes:
        parameters: What the model computes with.
        gradients: Before the optimizer step.
        masters: fp32 copies that the optimizer steps on, where they are not the parameters.
        optimizer: State, for two moments in fp32 (AdamW).
    """

    parameters: float
    gradients: float
    masters: float
    optimizer: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.parameters + self.gradients + self.masters + self.optimizer


def bytes_per_parameter(strategy: str, ranks: int, *, low: bool) -> Bytes:
    """Give a strategy's formula.

    Args:
        strategy: As `strategy=`.
        ranks: That shards are divided among.
        low: `strategy.make.parameters=low` in bf16; means nothing to `single` and `ddp`.

    Raises:
        KeyError: No such strategy.
    """
    kept = 2 if low else 4
    shard = 1 / ranks
    return {
        "single": Bytes(4, 4, 0, 8),
        "ddp": Bytes(4, 4, 0, 8),
        # In bf16 stage 1 is a class of its own, which adds gradients up whole and in fp32.
        "zero1": Bytes(kept, 6 if low else 4 * shard, 4 * shard, 8 * shard),
        "zero2": Bytes(kept, 4 * shard, 4 * shard, 8 * shard),
        "zero3": Bytes(kept * shard, 4 * shard, 4 * shard, 8 * shard),
        "zero3_offload": Bytes(
            kept * shard, 8 * shard, 4 * shard, 8 * shard
        ),  # twice: host, device
        "fsdp": Bytes(4 * shard, 4 * shard, 0, 8 * shard),
    }[strategy]
