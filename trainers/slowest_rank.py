"""Which rank the others wait for, from what each does alone in a step."""

import statistics
import sys
from collections.abc import Callable, Sequence

SLOW = 1.5
"""A rank whose own work takes so many times the median's is named ..."""

NOTABLE = 0.1
"""... where the difference is at least this part of a step; below, nobody gains by mending it."""


class SlowestRank:
    """Rows of `perf/slowest_rank` and `perf/slowdown`, and a word when a rank holds up the others.

    `perf/slowdown` is the slowest rank's own work (`trainers.callbacks.own_work`) over the median
    of all ranks, of an even number the lower of the two in the middle.

    Args:
        name_of: Gives a rank's name for people, with its host where there are several.
    """

    def __init__(self, name_of: Callable[[int], str]):
        self._name_of = name_of
        self._named: int | None = None
        self._num_rows = 0

    def row(self, own_s: Sequence[float], *, step_s: float, says: bool) -> dict[str, float]:
        """Judge what each rank has done alone in a step.

        Args:
            own_s: Seconds of its own work in a step, by rank.
            step_s: Seconds of a step.
            says: Whether to say on this rank who is slow: once, and when it is another.
        """
        slowest = max(range(len(own_s)), key=own_s.__getitem__)
        usual = statistics.median_low(own_s)
        self._num_rows += 1
        is_slow = own_s[slowest] > SLOW * usual and own_s[slowest] - usual > NOTABLE * step_s
        # The first row of a launch is of what happens once.
        if says and is_slow and slowest != self._named and self._num_rows > 1:
            self._named = slowest
            print(
                f"note: {self._name_of(slowest)} is the slowest: its own part of a step (data, "
                f"callbacks, forward pass) takes {own_s[slowest]:.3g} s where {usual:.3g} s is "
                f"usual, and the others wait for it",
                file=sys.stderr,
                flush=True,
            )
        return {"perf/slowest_rank": slowest, "perf/slowdown": own_s[slowest] / max(usual, 1e-9)}
