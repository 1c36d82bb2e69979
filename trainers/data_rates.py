"""What reading the data costs and gives, from the counters of a datamodule."""

from typing import Any

import torch
from lightning.pytorch import Trainer

_SUMMED = ("samples", "bytes", "cache_hits", "cache_misses", "fetched_bytes")
_TOTALS = ("bad_samples", "retries", "uncached")


class DataRates:
    """Rows of `data/...` for a datamodule with `counters()`, `epochs` and `seconds_waited`.

    Of what lies between two rows, over all ranks: `data/samples_per_s` and `data/mb_per_s` read,
    workers' reading ahead among them (MB as 10^6 stored bytes), `data/wait_s` (seconds that a step
    waited for its batches, mean over ranks). Where shards are remote also `data/fetched_mb_per_s`
    and `data/cache_hit_rate` (blocks that this node's disk had when they were needed). Since this
    launch began, once there are any: `data/bad_samples`, `data/retries`, `data/uncached` (blocks).
    Of a blend `data/epochs/<source>`, the passes over each.
    """

    def __init__(self) -> None:
        self._before: dict[str, float] = {}

    def start(self, trainer: Trainer) -> None:
        """Begin an interval."""
        self._before = self._read(trainer)

    def row(self, trainer: Trainer, *, seconds: float, num_steps: int) -> dict[str, float]:
        """Give the rates since the last row, or since the start; collective.

        Args:
            trainer: whose datamodule is read.
            seconds: length of the interval, validation left out.
            num_steps: optimizer steps in it.
        """
        now = self._read(trainer)
        if not now:
            return {}
        local = [now[name] - self._before.get(name, 0) for name in ("seconds_waited", *_SUMMED)]
        local += [now[name] for name in _TOTALS]
        device = trainer.strategy.root_device
        # float32, which every device has, holds bytes of an interval to seven digits.
        sums = torch.tensor(local, dtype=torch.float32, device=device)
        waited, *rest = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        counts = dict(zip((*_SUMMED, *_TOTALS), rest, strict=True))
        self._before = now
        row = {
            "data/samples_per_s": counts["samples"] / seconds,
            "data/mb_per_s": counts["bytes"] / seconds / 1e6,
            "data/wait_s": waited / trainer.world_size / max(1, num_steps),
        }
        if asked := counts["cache_hits"] + counts["cache_misses"]:
            row["data/cache_hit_rate"] = counts["cache_hits"] / asked
        if asked or counts["fetched_bytes"]:
            row["data/fetched_mb_per_s"] = counts["fetched_bytes"] / seconds / 1e6
        row |= {f"data/{name}": counts[name] for name in _TOTALS if counts[name]}
        return row | self._epochs(trainer)

    def _read(self, trainer: Any) -> dict[str, float]:
        counters = getattr(trainer.datamodule, "counters", dict)()
        return counters and {**counters, "seconds_waited": trainer.datamodule.seconds_waited}

    def _epochs(self, trainer: Any) -> dict[str, float]:
        epochs = trainer.datamodule.epochs
        return {f"data/epochs/{name}": passes for name, passes in epochs.items() if name}
