"""Ranks that meet: one that differs is named, and none waits for one that has ended."""

import os
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from launch import acceptance, meeting, rendezvous
from launch.meeting import AbsentError, Meeting
from launch.run_directory import RunDirectory
from launch.start_facts import digest_of_code, facts_of_start

NUM_RANKS = 3
TIMEOUT_S = 20.0


@pytest.fixture
def stores():
    """Connections to one store, for a rank each."""
    server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    clients = [TCPStore("localhost", server.port, is_master=False) for _ in range(1, NUM_RANKS)]
    return [server, *clients]


def on_all(stores, work):
    """Run `work(meeting)` on every rank; gives results, or the errors."""

    def run(rank):
        try:
            with Meeting(stores[rank], rank, len(stores), TIMEOUT_S).attended() as met:
                return work(met)
        except ValueError as error:
            return error

    with ThreadPoolExecutor(len(stores)) as pool:
        return list(pool.map(run, range(len(stores))))


def test_rank_that_differs_is_named_on_all(stores):
    facts = [{"torch": "2.13", "seed": "1"}, {"torch": "2.13", "seed": "1"}, {"torch": "2.11"}]
    errors = on_all(stores, lambda met: met.compare("start", facts[met.rank]))
    assert len({str(error) for error in errors}) == 1
    assert re.search(
        r"^\S+ \(rank 2\) -> torch=2.11 where rank 0 on \S+ has 2.13, seed=.absent. where .* 1 -",
        str(errors[0]),
    )


def test_ranks_that_agree_go_on(stores):
    assert on_all(stores, lambda met: met.compare("start", {"seed": "1"})) == [None] * NUM_RANKS


def test_others_wait_for_the_word_of_rank_zero(stores):
    order = []

    def work(met):
        if met.is_first:
            time.sleep(0.3)
            order.append("told")
            return met.tell({"last": "step-00000005"})
        word = met.hear()
        order.append("heard")
        return word

    assert on_all(stores, work)[1:] == [{"last": "step-00000005"}] * 2
    assert order[0] == "told"


def test_error_of_one_rank_ends_those_that_wait(stores):
    def work(met):
        if met.is_first:
            raise ValueError("run.name=x -> it is taken")
        return met.hear()

    told = on_all(stores, work)
    assert "rank 0 on " in str(told[1])
    assert "run.name=x -> it is taken" in str(told[2])
    assert isinstance(told[1], AbsentError)


@pytest.mark.parametrize("is_done", [False, True])
@pytest.mark.parametrize("is_late", [False, True])
def test_rank_zero_ends_when_all_have_read_why_or_one_does_not_come(
    stores, monkeypatch, is_late, is_done
):
    """They read it in the store, which may end with rank 0."""
    monkeypatch.setattr(meeting, "FAREWELL_S", 0.3 if is_late else 600.0)
    has_ended = threading.Event()

    def lead():
        with suppress(ValueError), Meeting(stores[0], 0, NUM_RANKS, TIMEOUT_S).attended() as met:
            if not is_done:
                raise ValueError("run.name=x -> it is taken")
            met.tell({"is_done": True})
        has_ended.set()

    def follow(rank):
        with Meeting(stores[rank], rank, NUM_RANKS, TIMEOUT_S).attended() as met:
            if is_done:
                assert met.hear() == {"is_done": True}
            else:
                with pytest.raises(AbsentError, match="it is taken"):
                    met.hear()

    leading = threading.Thread(target=lead)
    leading.start()
    follow(1)
    assert has_ended.wait(timeout=600 if is_late else 0.5) == is_late
    follow(2)
    leading.join()


def test_rank_zero_that_goes_on_to_train_waits_for_nobody_at_its_end(stores, monkeypatch):
    monkeypatch.setattr(meeting, "FAREWELL_S", 600.0)
    with Meeting(stores[0], 0, NUM_RANKS, TIMEOUT_S).attended() as met:
        met.adjourn()


@pytest.mark.parametrize(("beat", "seconds"), [(None, 1), ("1", 0)], ids=["absent", "silent"])
def test_rank_without_signs_of_life_is_not_waited_for(stores, monkeypatch, beat, seconds):
    monkeypatch.setattr(meeting, "PATIENCE_S", 0.3)
    if beat:
        stores[0].set("beat/0", beat)
    met = Meeting(stores[1], 1, NUM_RANKS, timeout_s=1.0)
    with pytest.raises(AbsentError, match=f"rank 0 -> it has not been heard of for {seconds} s"):
        met.hear()


def test_checkpoint_whose_name_is_there_before_its_files_is_waited_for(tmp_path):
    run = RunDirectory(tmp_path)
    assert acceptance._last(run) is None
    path = run.checkpoints / "step-00000005"
    run.checkpoints.mkdir()
    (run.checkpoints / "last").write_text(f"{path.name}\n")
    assert acceptance._last(run) is None
    path.mkdir()
    assert acceptance._last(run) is None
    (path / "manifest.json").touch()
    assert acceptance._last(run) == path.name


def test_facts_are_of_code_packages_and_configuration(compose, tmp_path):
    facts = facts_of_start(compose("train", ["seed=7"]))
    assert facts["seed"] == "7"
    assert {"torch", "lightning", "python", "code", "module.optimizer.lr"} <= facts.keys()
    (tmp_path / "launch").mkdir()
    file = tmp_path / "launch" / "x.py"
    file.write_text("1")
    before = digest_of_code(tmp_path)
    file.write_text("2")
    assert digest_of_code(tmp_path) != before


def test_remains_of_an_earlier_start_are_not_believed(stores):
    def start(num_ranks, place, ranks=None):
        deadline = time.monotonic() + TIMEOUT_S

        def run(rank):
            return rendezvous.agree(
                stores[rank], rank, num_ranks, deadline, place if rank == 0 else ""
            )

        with ThreadPoolExecutor(num_ranks) as pool:
            return list(pool.map(run, range(num_ranks)))

    assert start(3, "first:1") == ["first:1"] * 3
    assert start(2, "second:2") == ["second:2"] * 2
    assert start(3, "third:3") == ["third:3"] * 3


def test_rank_that_does_not_come_is_named(stores, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(ValueError, match=r"rank\(s\) \[1, 2\] did not come .* node1:29500"):
        rendezvous.agree(stores[0], 0, NUM_RANKS, time.monotonic() + 0.5, "here:1")


def test_address_that_does_not_answer_is_named_in_bounded_time(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "9")
    with pytest.raises(ValueError, match=r"rendezvous_timeout_s=1 -> 127.0.0.1:9, .* not answered"):
        rendezvous.connect(1, 2, timeout_s=1.0)


def test_port_that_another_service_has_is_named(monkeypatch):
    with socket.create_server(("", 0)) as service:
        port = service.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(ValueError, match=rf"cluster.port={port} -> rank 0 cannot listen there"):
            rendezvous.connect(0, 2, timeout_s=60.0)


def test_starts_that_an_agent_repeats_have_a_store_each(monkeypatch):
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    lock, places = threading.Lock(), []

    def start(rank):
        store = rendezvous.connect(rank, 2, timeout_s=TIMEOUT_S)
        with lock:
            places.append(store.port)
        return store

    for _ in range(2):
        for name, value in {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(agent.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_MAX_RESTARTS": "3",
        }.items():
            monkeypatch.setitem(os.environ, name, value)
        with ThreadPoolExecutor(2) as pool:
            first, second = pool.map(start, range(2))
        first.set("key", "value")
        assert second.get("key") == b"value"
        assert os.environ["MASTER_PORT"] == str(first.port)
    assert len(set(places)) == 2
    assert agent.port not in places
