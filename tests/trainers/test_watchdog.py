"""Signs of life that ranks leave for each other, and what is made of them when a run fails."""

import re
import threading
import time
from types import SimpleNamespace

import pytest
from torch._C._distributed_c10d import TCPStore

from trainers import heartbeats
from trainers.callbacks import watchdog
from trainers.checkpoint_writer import GivenUpError
from trainers.heartbeats import Heartbeats, blame


def record(position, is_waiting=False, **others):
    facts = {"beat": 1, "step": 3, "doing": "backward pass", "place": "own.py:1 in f"}
    facts["host"] = None
    return facts | {"position": position, "is_waiting": is_waiting} | others


def test_rank_that_others_wait_for_is_blamed():
    behind, ahead = record([3, 1], place="own.py:7 in sleep"), record([3, 2], is_waiting=True)
    assert blame({0: ahead, 1: behind, 2: ahead}, []) == (
        "rank 1 has made no progress since step 3, backward pass (own.py:7 in sleep)"
    )
    assert blame({0: behind, 1: ahead}, []).startswith("rank 0 has made no progress")
    # Equally far: those that wait in a collective wait for the one that does not.
    assert blame({0: ahead, 1: ahead, 2: record([3, 2])}, []).startswith("rank 2 has")
    assert blame({0: ahead, 1: ahead}, []).startswith("ranks 0, 1 have all made no progress")
    # Of several hosts, each rank's own is named.
    assert blame({0: ahead, 1: behind | {"host": "node2"}}, []).startswith("rank 1 on node2 has")
    hosts = {rank: record([1, 0], host=f"node{rank}") for rank in range(2)}
    assert blame(hosts, []).startswith("ranks 0 on node0, 1 on node1 have all made no progress")
    assert blame(hosts, [1]).startswith("rank 1 on node1 has not been heard of since step 3")
    # A later micro-batch is further, however little has been done of it.
    assert blame({0: record([4, 0]), 1: behind}, []).startswith("rank 1 has")


def test_silent_rank_is_blamed_before_any_that_is_heard():
    behind, ahead = record([3, 1]), record([3, 2], step=4)
    assert blame({0: behind, 1: ahead}, [1]).startswith("rank 1 has not been heard of since step 4")
    assert blame({0: behind}, [1]).startswith("rank 1 has not been heard of since the start")


@pytest.fixture
def three_ranks(monkeypatch):
    """Heartbeats of three ranks at a store that these tests hold."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(heartbeats, "_get_default_store", lambda: store)
    monkeypatch.setattr(heartbeats, "SILENCE_S", 1.0)
    return [Heartbeats(rank, num_ranks=3) for rank in range(3)]


def test_ranks_without_a_sign_of_life_are_found(three_ranks, monkeypatch):
    for beats in three_ranks[:2]:  # rank 2 has never said anything
        beats.publish(record([1, 0]))
    assert three_ranks[0].listen() == ({0: record([1, 0]), 1: record([1, 0])}, [1, 2])

    def meanwhile(seconds):
        three_ranks[1].publish(record([1, 0], beat=2))

    clock = SimpleNamespace(monotonic=time.monotonic, sleep=meanwhile)
    monkeypatch.setattr(heartbeats, "time", clock)
    assert three_ranks[0].listen()[1] == [2]


def test_pause_of_the_whole_machine_is_no_silence(three_ranks, monkeypatch):
    """It takes one of several short waits, in whose rest the other rank is heard."""
    waits = []

    def pause(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            three_ranks[1].publish(record([1, 0], beat=2))

    for beats in three_ranks:
        beats.publish(record([1, 0]))
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=pause)
    monkeypatch.setattr(heartbeats, "time", clock)
    assert three_ranks[0].listen()[1] == [2]
    assert sum(waits) == pytest.approx(heartbeats.SILENCE_S)


def test_rank_zero_is_blamed_when_the_store_is_gone_with_it(three_ranks):
    for beats in three_ranks:
        beats.publish(record([1, 0]))

    def refuse(keys):
        raise RuntimeError("Connection reset by peer")

    three_ranks[1]._store = SimpleNamespace(check=refuse)
    assert three_ranks[1].listen() == ({0: record([1, 0])}, [0])


def test_silent_rank_is_gone_after_a_while_and_all_learn_of_it(three_ranks, monkeypatch):
    monkeypatch.setattr(heartbeats, "GONE_S", 0.3)
    first, second, third = three_ranks
    for number in range(8):
        for beats in (first, second):
            beats.publish(record([1, 0], beat=number))
        assert not first.is_one_gone()  # rank 2 has said nothing yet: it may be starting
        assert not second.is_one_gone()
        time.sleep(0.1)
    for beats in (first, second):
        beats.publish(record([1, 0], beat=8))
    third.publish(record([1, 0]))
    assert not first.is_one_gone()
    time.sleep(0.4)
    for beats in (first, second):
        beats.publish(record([1, 0], beat=9))
    assert first.is_one_gone()
    assert not second.is_one_gone()  # it listens to rank 0 alone
    first.tell("rank 2 has not been heard of")
    assert second.is_one_gone()


def test_rank_zero_is_gone_with_its_store(three_ranks, monkeypatch):
    monkeypatch.setattr(heartbeats, "GONE_S", 0.3)
    monkeypatch.setattr(three_ranks[1], "_ask", lambda question: None)
    assert not three_ranks[1].is_one_gone()
    time.sleep(0.4)
    assert three_ranks[1].is_one_gone()


def test_first_reason_stays(three_ranks):
    assert three_ranks[0].told() is None
    assert three_ranks[1].tell("rank 1 has had enough")
    assert not three_ranks[2].tell("connection closed by peer")
    assert three_ranks[0].told() == "rank 1 has had enough"


def test_reason_is_known_to_ranks_that_live_on_without_the_store(three_ranks):
    """Rank 0 stays until they have it, and for none that is silent."""
    first, second, third = three_ranks
    first.publish(record([1, 0]))
    second.publish(record([1, 0]))
    first.tell("rank 0 failed at step 3: ValueError: ...")
    ends = threading.Event()

    def leave():
        first.stay_until_heard(600.0)
        ends.set()

    leaving = threading.Thread(target=leave)
    leaving.start()
    second.publish(record([1, 1], beat=2))
    assert not ends.wait(0.5)  # for the third
    third.publish(record([1, 1]))
    leaving.join()
    second._store = third._store = None
    assert second.told() == third.told() == "rank 0 failed at step 3: ValueError: ..."


def test_rank_zero_stays_for_none_that_is_silent(three_ranks):
    first, _, third = three_ranks
    third.tell("rank 2 has had enough")
    assert first.listen()[1] == [1, 2]
    first.stay_until_heard(600.0)


def test_rank_zero_stays_no_longer_than_it_may(three_ranks):
    three_ranks[0].stay_until_heard(600.0)  # there is no reason yet
    three_ranks[0].tell("rank 0 has had enough")
    three_ranks[0].stay_until_heard(0.2)
    assert not three_ranks[0]._store.check(["heard/1"])


def test_watchdog_ends_what_gets_nowhere_and_nothing_else(monkeypatch, capsys):
    ended, reports = threading.Event(), []

    def leave(code):
        assert code == 1
        ended.set()
        dog.teardown(trainer, None, "fit")

    monkeypatch.setattr(watchdog.os, "_exit", leave)
    monkeypatch.setattr(watchdog, "BEAT_S", 0.05)
    clock, said = [0.0], []
    times = SimpleNamespace(monotonic=lambda: clock[0], sleep=time.sleep)
    monkeypatch.setattr(watchdog, "time", times)

    def report(*report):
        reports.append(report)
        raise OSError(28, "No space left on device")

    dog = watchdog.Watchdog(timeout_s=1.0, report=report, last_words=said.append)
    trainer = SimpleNamespace(global_rank=0, world_size=1, global_step=6, num_nodes=1)
    dog.setup(trainer, None, "fit")
    for micro_batch in range(6):
        dog.on_train_batch_start(trainer, None, None, micro_batch)
        clock[0] += 0.9
        time.sleep(0.1)
    assert not ended.is_set()
    clock[0] += 0.2
    assert ended.wait(timeout=60)
    ((reason, step),) = reports
    assert step == 7
    assert said == [reason]
    assert "rank 0 has made no progress since step 7, forward pass (" in reason
    assert "test_watchdog.py:" in reason  # where this thread waits
    assert f"error: {reason}" in capsys.readouterr().err


@pytest.fixture
def three_dogs(three_ranks, monkeypatch):
    """Watchdogs of three ranks that have begun; each keeps what it reports in `reports`."""
    monkeypatch.setattr(watchdog, "FAREWELL_S", 0.0)
    dogs = []
    for beats in three_ranks:
        dog = watchdog.Watchdog(timeout_s=100, report=None, last_words=None)
        dog.reports = []
        dog.report = lambda reason, step, reports=dog.reports: reports.append(reason)
        dog._beats, dog.trainer = beats, SimpleNamespace(global_rank=beats.rank, global_step=4)
        dogs.append(dog)
    return dogs


def test_reason_of_the_first_rank_to_fail_is_that_of_its_peers(three_dogs):
    first, second, third = three_dogs[::-1]
    first.on_exception(first.trainer, None, RuntimeError("out of patience"))
    second.on_exception(second.trainer, None, RuntimeError("[gloo] Connection closed by peer"))
    third.on_exception(third.trainer, None, ValueError("of its own, and later"))
    reason = "rank 2 failed at step 0: RuntimeError: out of patience"
    assert (first.reports, second.reports, third.reports) == ([reason], [reason], [])


def test_rank_left_alone_with_a_checkpoint_reports_why(three_dogs, monkeypatch):
    first, second, _ = three_dogs
    given_up = GivenUpError("runs_dir -> step-4 is not written -> ...")

    def fail_now(seconds):  # while the other listens
        first.on_exception(first.trainer, None, ValueError("No space left on device"))

    clock = SimpleNamespace(monotonic=time.monotonic, sleep=fail_now)
    monkeypatch.setattr(heartbeats, "time", clock)
    second.on_exception(second.trainer, None, given_up)
    reason = "rank 0 failed at step 0: ValueError: No space left on device"
    assert (first.reports, second.reports) == ([], [reason])  # rank 0 writes its own


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (GivenUpError("runs_dir -> why -> what"), "GivenUpError: runs_dir -> why -> what"),
        (RuntimeError("NCCL error: invalid usage"), "RuntimeError: NCCL error: invalid usage"),
    ],
    ids=["a checkpoint given up", "words of a lost connection"],
)
def test_error_that_no_other_rank_has_a_reason_for_is_told(three_dogs, monkeypatch, error, told):
    def all_live(seconds):
        for dog in three_dogs:
            dog._beats.publish(record([1, 0], beat=2))

    clock = SimpleNamespace(monotonic=time.monotonic, sleep=all_live)
    monkeypatch.setattr(heartbeats, "time", clock)
    second = three_dogs[1]
    second.on_exception(second.trainer, None, error)
    assert second.reports == [f"rank 1 failed at step 0: {told}"]
    assert three_dogs[2]._beats.told() == second.reports[0]


def test_full_disk_is_told_with_what_to_do(three_dogs):
    full = OSError(28, "No space left on device", "runs/small/metrics.jsonl")
    three_dogs[1].on_exception(three_dogs[1].trainer, None, full)
    assert re.search(
        r"runs/small/metrics.jsonl -> .*No space.* -> make room", three_dogs[1].reports[0]
    )


def test_report_that_cannot_be_written_ends_nothing_else(three_dogs):
    def refuse(reason, step):
        raise OSError(28, "No space left on device")

    three_dogs[1].report = refuse
    three_dogs[1].on_exception(three_dogs[1].trainer, None, RuntimeError("out of patience"))
    assert "out of patience" in three_dogs[2]._beats.told()


def test_rank_too_late_for_a_collective_is_named(three_dogs, monkeypatch):
    def beat(number):
        for dog in three_dogs:
            position = [1, 0 if dog is three_dogs[1] else 1]
            dog._beats.publish(record(position, beat=number))

    beat(1)
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: beat(2))
    monkeypatch.setattr(heartbeats, "time", clock)
    late = RuntimeError("[gloo] Timed out waiting 1000ms for recv operation to complete")
    three_dogs[0].on_exception(three_dogs[0].trainer, None, late)
    (reason,) = three_dogs[0].reports
    assert reason.startswith("rank 1 has made no progress since step 3")
