"""What the processes of a loader have read, added up where the training loop can see it."""

from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray


class Counter(IntEnum):
    """Places in a row of counters."""

    SAMPLES = 0  # handed over
    BYTES = 1  # of them, as they are stored
    BAD_SAMPLES = 2  # others were given for
    CACHE_HITS = 3  # blocks of remote shards that this node's disk had
    CACHE_MISSES = 4  # that were fetched
    FETCHED_BYTES = 5
    RETRIES = 6  # of fetches that failed
    UNCACHED = 7  # blocks that the cache had no room for


Row = NDArray[np.int64]


def new_row() -> Row:
    """Counters of a process that nobody looks at."""
    return np.zeros(len(Counter), np.int64)


class Meter:
    """Counters in shared memory, a row for each process; rows are written by their process only.

    Args:
        num_processes: workers, or 1.
    """

    def __init__(self, num_processes: int) -> None:
        shape = num_processes, len(Counter)
        self._rows = torch.zeros(shape, dtype=torch.int64).share_memory_()

    def row(self, process: int) -> Row:
        """The counters of a process, int64 [counters], to add to in place."""
        return self._rows[process].numpy()

    def totals(self) -> dict[str, int]:
        """Sums over processes, by name in lower case."""
        sums = self._rows.sum(0).tolist()
        return {counter.name.lower(): sums[counter] for counter in Counter}
