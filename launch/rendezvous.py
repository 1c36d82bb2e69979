"""The store over which the ranks of one start find each other, and what is said if they do not."""

import json
import os
import secrets
import socket
import time
from datetime import timedelta
from typing import Any

POLL_S = 0.1
ATTEMPT_S = 5.0
"""A connection that is not there is tried anew so often: a signal would have to wait for it."""


def connect(rank: int, num_ranks: int, timeout_s: float) -> Any:
    """Open the store of this start; torch's process group will use it, too.

    The agent of torchrun keeps its store when it starts ranks anew, with all that is in it: where
    it may do so rank 0 opens another, and the ranks agree on its address.

    Args:
        rank: This one.
        num_ranks: All of them.
        timeout_s: In which all must have come.

    Raises:
        ValueError: They have not; names the address.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline = time.monotonic() + timeout_s
    is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not is_agents or os.environ.get("TORCHELASTIC_MAX_RESTARTS") == "0":
        is_server = rank == 0 and not is_agents
        return _open(address, port, is_server=is_server, deadline=deadline, timeout_s=timeout_s)
    agent = _open(address, port, is_server=False, deadline=deadline, timeout_s=timeout_s)
    store, place = None, ""
    if rank == 0:
        store = _open("0.0.0.0", 0, is_server=True, deadline=deadline, timeout_s=timeout_s)
        place = f"{_own_address(address, port)}:{store.port}"
    place = agree(agent, rank, num_ranks, deadline, place)
    own, _, port_text = place.rpartition(":")
    os.environ |= {"MASTER_ADDR": own, "MASTER_PORT": port_text}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    if store is not None:
        return store
    return _open(own, int(port_text), is_server=False, deadline=deadline, timeout_s=timeout_s)


def agree(agent: Any, rank: int, num_ranks: int, deadline: float, place: str = "") -> str:
    """Agree on where this start's own store is, over a store with remains of earlier starts.

    Every rank says hello by a number that it has just drawn. Rank 0 answers with all that it has
    read, again when one changes; a rank believes the answer that has its own number.

    Args:
        agent: The store that outlives starts.
        rank: This one.
        num_ranks: All of this start.
        deadline: Of `time.monotonic`.
        place: Of rank 0's store, as rank 0.
    """
    mine = secrets.token_hex(8)
    agent.set(f"hello/{rank}", mine)
    others = range(1, num_ranks)

    def read(name: str) -> str:
        return agent.get(name).decode() if agent.check([name]) else ""

    while time.monotonic() < deadline:
        if rank == 0:
            hellos = [read(f"hello/{other}") for other in others]
            answer = json.dumps({"hellos": [mine, *hellos], "place": place})
            if read("answer") != answer:
                agent.set("answer", answer)
            if [read(f"heard/{other}") for other in others] == [h + mine for h in hellos]:
                return place
        elif text := read("answer"):
            said = json.loads(text)
            if said["hellos"][rank : rank + 1] == [mine]:
                agent.set(f"heard/{rank}", mine + said["hellos"][0])
                return said["place"]
        time.sleep(POLL_S)
    absent = [r for r in others if read(f"heard/{r}") != read(f"hello/{r}") + mine]
    who = f"rank(s) {absent}" if rank == 0 else "rank 0"
    raise ValueError(
        f"cluster.rendezvous_timeout_s -> {who} did not come to the store at "
        f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} -> see their output"
    )


def _open(address: str, port: int, *, is_server: bool, deadline: float, timeout_s: float) -> Any:
    from torch.distributed import DistError, TCPStore  # pyright: ignore[reportPrivateImportUsage]

    while True:
        left = max(1.0, min(ATTEMPT_S, deadline - time.monotonic()))
        try:
            return TCPStore(
                address,
                port,
                is_master=is_server,
                wait_for_workers=False,
                multi_tenant=True,  # torch's process group opens it once more
                timeout=timedelta(seconds=left if not is_server else timeout_s),
            )
        except (DistError, RuntimeError, OSError) as error:
            if is_server:
                raise ValueError(
                    f"cluster.port={port} -> rank 0 cannot listen there on {address} "
                    f"({_first_line(error)}) -> give a port of that machine that is free"
                ) from error
            if time.monotonic() < deadline:
                continue
            raise ValueError(
                f"cluster.rendezvous_timeout_s={timeout_s:g} -> {address}:{port}, where rank 0 is "
                f"to be met, has not answered ({_first_line(error)}) -> see whether rank 0 runs, "
                "and whether that address may be reached from here (cluster.interface, "
                "cluster.port, firewall)"
            ) from error


def _own_address(address: str, port: int) -> str:
    """An address of this machine that those who reach `address` reach, too."""
    with socket.create_connection((address, port)) as probe:
        mine, there = probe.getsockname()[0], probe.getpeername()[0]
    return address if mine == there else mine


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
