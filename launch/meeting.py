"""Ranks that somebody else has started meet before anything is built.

Each has composed its configuration for itself, on a machine of its own. They compare what must
agree, rank 0 goes first (prepares data, accepts the run), and the others wait for its word: over
the network, since a shared file system may show late what another node has written.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from omegaconf import DictConfig

from launch.cluster import host, is_rank
from launch.rendezvous import connect

PATIENCE_S = 60.0
"""How long a rank may give no sign of life; it gives one every second."""
POLL_S = 0.1
FAREWELL_S = 5.0
"""Most seconds for the others to read what rank 0 said: the store may end with its process."""
Facts = Mapping[str, str]


class Meeting:
    """The ranks of one start, over a store of torch's that rank 0 holds. Alone there is nobody.

    Args:
        store: The store; None of one rank.
        rank: This one.
        num_ranks: All of them.
        timeout_s: In which all must have come.
    """

    def __init__(self, store: Any, rank: int, num_ranks: int, timeout_s: float):
        self.store, self.rank, self.num_ranks = store, rank, num_ranks
        self.timeout_s = timeout_s
        self.is_first = rank == 0
        self._is_over, self._is_adjourned = threading.Event(), False

    def compare(self, subject: str, facts: Facts) -> None:
        """Compare facts with those of rank 0; collective.

        Args:
            subject: What is compared, once a start.
            facts: Key -> value.

        Raises:
            ValueError: They differ; names the first rank that does, its node and what differs.
        """
        if self.num_ranks == 1:
            return
        mine = json.dumps({"host": host(), "facts": dict(facts)})
        self.store.set(f"{subject}/{self.rank}", mine)
        if self.is_first:
            told = [self._read(f"{subject}/{rank}", rank) for rank in range(self.num_ranks)]
            self.store.set(f"{subject}/verdict", json.dumps({"difference": find_odd(told)}))
        if difference := self._read(f"{subject}/verdict", 0)["difference"]:
            raise ValueError(difference)

    def tell(self, word: Mapping[str, Any]) -> None:
        """Tell the others, as rank 0, that they may go on, and what they need to know."""
        if self.num_ranks > 1:
            self.store.set("word", json.dumps(word))

    def hear(self) -> dict[str, Any]:
        """Wait for the word of rank 0, which may prepare data for hours, as long as it lives."""
        return self._read("word", 0)

    def adjourn(self) -> None:
        """Training begins, and nobody reads here any more."""
        self._is_adjourned = True

    @contextmanager
    def attended(self) -> Iterator["Meeting"]:
        """Give signs of life, and tell the others of an error."""
        if self.num_ranks == 1:
            yield self
            return
        threading.Thread(target=self._beat, daemon=True).start()
        try:
            yield self
        except BaseException as error:
            if not isinstance(error, AbsentError):
                reason = f"rank {self.rank} on {host()} has ended: {error}"
                with suppress(RuntimeError):  # who holds the store is gone
                    self.store.compare_set("ended", "", reason)
            raise
        finally:
            if not self._is_adjourned:
                self._part()
            self._is_over.set()

    def _part(self) -> None:
        """Leave; rank 0 once the others have read its word, or why it ends, as long as some may."""
        deadline = time.monotonic() + FAREWELL_S
        others = [f"left/{rank}" for rank in range(1, self.num_ranks)]
        with suppress(RuntimeError):  # who holds the store is gone
            self.store.set(f"left/{self.rank}", "")
            while self.is_first and not self.store.check(others) and time.monotonic() < deadline:
                time.sleep(POLL_S)

    def _beat(self) -> None:
        count = 0
        while not self._is_over.wait(1.0):
            count += 1
            try:
                self.store.set(f"beat/{self.rank}", str(count))
            except RuntimeError:  # who holds the store is gone
                return

    def _read(self, key: str, rank: int) -> Any:
        """Wait until a rank has set a key, as long as all is well."""
        last_beat, heard_at = "", time.monotonic()
        while True:
            try:
                has_ended = self.store.check(["ended"])  # first: what was set before it counts
                if self.store.check([key]):
                    return json.loads(self.store.get(key))
                if has_ended:
                    raise AbsentError(self.store.get("ended").decode())
                alive = f"beat/{rank}"
                beat = self.store.get(alive).decode() if self.store.check([alive]) else ""
            except RuntimeError as error:
                raise AbsentError("rank 0 is gone, and its reason is in its output") from error
            if beat != last_beat:
                last_beat, heard_at = beat, time.monotonic()
            patience_s = PATIENCE_S if beat else self.timeout_s
            if time.monotonic() - heard_at > patience_s:
                raise AbsentError(
                    f"rank {rank} -> it has not been heard of for {patience_s:.0f} s, before "
                    f"training -> look at its output, and whether its machine is still there"
                )
            time.sleep(POLL_S)


class AbsentError(ValueError):
    """Another rank has ended or is silent."""


def find_odd(told: list[dict[str, Any]]) -> str | None:
    """Say by what the first rank that differs from rank 0 does so; None where none does."""
    first = told[0]
    for other in told[1:]:
        mine, theirs = first["facts"], other["facts"]
        keys = [k for k in (mine | theirs) if mine.get(k) != theirs.get(k)]
        if keys:
            same = [r for r, each in enumerate(told) if each["facts"] == theirs]
            more = f", and {len(keys) - 3} more" if len(keys) > 3 else ""
            values = ", ".join(
                f"{key}={theirs.get(key, '(absent)')} where rank 0 on {first['host']} has "
                f"{mine.get(key, '(absent)')}"
                for key in keys[:3]
            )
            ranks = ", ".join(map(str, same))
            return (
                f"{other['host']} (rank {ranks}) -> {values}{more} -> give every rank the same "
                "code, packages, data and overrides"
            )
    return None


@contextmanager
def meet(config: DictConfig, num_ranks: int) -> Iterator[Meeting]:
    """Meet the other ranks; hold the store until the run has ended.

    Raises:
        ValueError: They could not be reached within `cluster.rendezvous_timeout_s`.
    """
    store, rank = None, int(os.environ.get("RANK", "0")) if is_rank() else 0
    if not is_rank():
        num_ranks = 1  # the ranks that this process will start have what it has
    timeout_s = float(config.cluster.rendezvous_timeout_s)
    if num_ranks > 1:
        from torch.distributed.distributed_c10d import PrefixStore

        store = connect(rank, num_ranks, timeout_s)
        store = PrefixStore("meeting", store)
    with Meeting(store, rank, num_ranks, timeout_s).attended() as meeting:
        yield meeting


def wait_until(is_there: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Wait for what another node has written; a shared file system may show it late.

    Raises:
        ValueError: It is not there in time.
    """
    deadline = time.monotonic() + timeout_s
    while not is_there():
        if time.monotonic() > deadline:
            raise ValueError(
                f"runs_dir -> {what}, which rank 0 sees, is not there on {host()} after "
                f"{timeout_s:.0f} s -> give all nodes a runs_dir that they share"
            )
        time.sleep(POLL_S)
