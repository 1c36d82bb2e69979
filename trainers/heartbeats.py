"""Signs of life that ranks leave for each other in torch's store, and what can be told from them.

The store is the one that torch built the process groups with: of the elastic agent where there is
one, otherwise of rank 0. It may be gone or frozen, so nothing here waits for it without end.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from types import FrameType
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

SILENCE_S = 4.0
"""A rank that gives no sign of life for so long is dead or frozen; it gives one every second."""

GONE_S = 60.0
"""A rank that gives no sign of life for so long while others wait does not come back: its machine
may have vanished without a word, and collectives would wait for it as long as they may."""

LOOKS = 8
"""A silence is as many short ones: a machine that pauses, and all ranks with it, skips one only."""

STORE_TIMEOUT_S, POLL_S = 10.0, 0.1

LIBRARIES = (f"{os.sep}site-packages{os.sep}", os.path.dirname(threading.__file__), "<frozen")

Record = dict[str, Any]
"""What a rank tells of itself: `beat` (how often it has), `position` (how far it is; lists compare
between ranks), `step`, `doing`, `place` in the code, `is_waiting` in a collective; `host` where
there are several."""


class Heartbeats:
    """The ranks' records, and the reason that the first of them to fail has told.

    Args:
        rank: This one.
        num_ranks: How many there are; alone, there is no store to ask.
    """

    def __init__(self, rank: int, num_ranks: int):
        self.rank, self.num_ranks = rank, num_ranks
        self._first: dict[int, Record] = {}  # of rank 0, as it was last read
        self._reason: str | None = None  # as it was read: the store may end before this rank
        self._silent: list[int] = []  # when they were last listened to
        self._heard: dict[int, tuple[Any, float]] = {}  # rank -> its last beat, and since when
        self._store: Store | None = None
        if num_ranks > 1:
            # A connection of its own: the main thread may wait on the other, holding its lock.
            store: Any = _get_default_store().clone()  # pyright: ignore[reportAttributeAccessIssue]
            store.set_timeout(timedelta(seconds=STORE_TIMEOUT_S))
            self._store = PrefixStore("heartbeats", store)

    def publish(self, record: Record) -> None:
        """Give a sign of life, look at that of rank 0, and for a reason to end."""

        def exchange(store: Store) -> None:
            store.set(str(self.rank), json.dumps(record))
            if self.rank:
                self._first = self._read(store, [0]) or self._first
            self._hear(store)

        self._ask(exchange)

    def tell(self, reason: str) -> bool:
        """Leave the reason for which the run fails; gives whether nobody was faster."""

        def leave(store: Store) -> bytes:
            told = store.compare_set("reason", "", reason)
            self._hear(store)
            return told

        return self._ask(leave) in (None, reason.encode())

    def told(self) -> str | None:
        """The reason that some rank has left, if one has."""
        if self._reason is None:
            self._ask(self._hear)
        return self._reason

    def stay_until_heard(self, timeout_s: float) -> None:
        """Wait, as rank 0, until the others have read the reason: the store may end with it.

        Args:
            timeout_s: The most to wait. For those who were silent just now nobody waits.
        """
        others = {*range(1, self.num_ranks)} - {*self._silent}
        if self.rank or not others or self.told() is None:
            return
        deadline, heard = time.monotonic() + timeout_s, [f"heard/{rank}" for rank in others]
        while self._ask(lambda s: s.check(heard)) is False and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def _hear(self, store: Store) -> None:
        if self._reason is None and store.check(["reason"]):
            self._reason = store.get("reason").decode()
            store.set(f"heard/{self.rank}", "")

    def wait_to_be_told(self) -> str | None:
        """Wait for a reason that another rank is about to leave; None where it leaves none."""
        deadline = time.monotonic() + SILENCE_S
        while (reason := self.told()) is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return reason

    def listen(self) -> tuple[dict[int, Record], list[int]]:
        """Listen for a while.

        Returns:
            The ranks' records, and the ranks that gave no sign of life.
        """
        if self._store is None:
            return {}, []
        before = self._ask(self._read)
        for _ in range(LOOKS):
            time.sleep(SILENCE_S / LOOKS)
        after = self._ask(self._read)
        if before is None or after is None:  # the store is gone, and rank 0, whose it was, with it
            return self._first, [0] if self.rank else []
        others = (rank for rank in range(self.num_ranks) if rank != self.rank)
        self._silent = [rank for rank in others if before.get(rank) == after.get(rank)]
        return after, self._silent

    def is_one_gone(self) -> bool:
        """Whether a rank has been silent for `GONE_S`, or some rank has left a reason to end.

        For a rank that waits, to ask again and again. Rank 0 listens to all, the others to rank 0.
        """
        now, told = time.monotonic(), self.told()
        watched = [0] if self.rank else range(1, self.num_ranks)
        records = self._ask(lambda store: self._read(store, watched)) or {}
        beats = {rank: record["beat"] for rank, record in records.items()}
        if self.rank and not beats:  # the store is gone
            beats = {0: None}
        self._heard |= {
            rank: (beat, now)
            for rank, beat in beats.items()
            if rank not in self._heard or self._heard[rank][0] != beat
        }
        return told is not None or any(now - since > GONE_S for _, since in self._heard.values())

    def name_of(self, rank: int) -> str:
        """A rank's name for people, as `name_rank`."""
        return name_rank(rank, (self._ask(lambda store: self._read(store, [rank])) or {}).get(rank))

    def _read(self, store: Store, ranks: Iterable[int] | None = None) -> dict[int, Record]:
        there = [rank for rank in ranks or range(self.num_ranks) if store.check([str(rank)])]
        return {rank: json.loads(store.get(str(rank))) for rank in there}

    def _ask(self, question: Callable[[Store], Any]) -> Any:
        """Ask the store; None where it does not answer, or there is none."""
        store, answers = self._store, []
        if store is None:
            return None

        def ask() -> None:
            try:
                answers.append(question(store))
            except RuntimeError:  # the process that held the store is gone
                return

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(STORE_TIMEOUT_S)
        return answers[0] if answers else None


def name_rank(rank: int, record: Record | None) -> str:
    """Name a rank, with its host where there are several and it has said which is its own."""
    host = record and record["host"]
    return f"rank {rank} on {host}" if host else f"rank {rank}"


def blame(records: dict[int, Record], silent: list[int]) -> str:
    """Say which rank the others wait for and where it stands: a silent one, or the furthest behind.

    Of ranks that are equally far, those in a collective wait for those that are not.
    """
    if silent:
        order = {rank: _furthest_behind(records.get(rank)) for rank in silent}
        rank = min(silent, key=order.__getitem__)
        last = records.get(rank)
        since = f"step {last['step']} ({last['doing']})" if last else "the start"
        return (
            f"{name_rank(rank, last)} has not been heard of since {since}: it was killed (the "
            f"usual reason is memory), it is frozen, or its machine is gone"
        )
    lowest = min(map(_furthest_behind, records.values()))
    behind = [rank for rank, record in records.items() if _furthest_behind(record) == lowest]
    names = [name_rank(rank, records[rank]) for rank in behind]
    who = f"{names[0]} has"
    if len(behind) > 1:
        who = f"ranks {', '.join(name.removeprefix('rank ') for name in names)} have all"
    last = records[behind[0]]
    return f"{who} made no progress since step {last['step']}, {last['doing']} ({last['place']})"


def _furthest_behind(record: Record | None) -> tuple[list[int], bool]:
    return (record["position"], record["is_waiting"]) if record else ([], False)


def locate(frame: FrameType | None) -> tuple[str, bool]:
    """Where a thread stands in code that is no library's, and whether it waits in a collective."""
    is_waiting, place = False, "place unknown"
    while frame is not None:
        name = frame.f_code.co_filename
        place = f"{name}:{frame.f_lineno} in {frame.f_code.co_name}"
        if not name.startswith(sys.prefix) and not any(library in name for library in LIBRARIES):
            break
        is_waiting |= f"torch{os.sep}distributed{os.sep}" in name
        frame = frame.f_back
    return place, is_waiting
