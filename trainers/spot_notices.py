"""Notices that a cloud machine will be taken away, looked for at its metadata service.

A machine at the market's price is stopped two minutes (AWS) or 30 seconds (Google Cloud, Azure)
after its notice.
"""

import json
import sys
import threading
import time
from collections.abc import Callable
from http.client import HTTPException
from socket import gethostname
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

METADATA = "http://169.254.169.254"
"""Where all three clouds answer what a machine asks about itself."""

TIMEOUT_S = 5.0
"""An answer comes in milliseconds where there is a service; elsewhere nothing may hang on it."""

PATIENCE_S = 150.0
"""Seconds without any answer before that is said: Azure's first may take two minutes."""

_direct = build_opener(ProxyHandler({}))  # a proxy would answer for its own machine


class SpotNotices:
    """Looks for a notice in a thread, until there is one.

    It never raises: a service that does not answer is no reason to end a run. It is said once if
    it has not answered since the start, since the machine may be of another kind.

    Args:
        source: `aws`, `gcp`, `azure`, or a url: an answer 200 whose body is not `FALSE` is a
            notice, 404 is none.
        every_s: Seconds between two looks.

    Attributes:
        notice: What was found; None for nothing yet.
    """

    def __init__(self, source: str, *, every_s: float):
        self.source, self.every_s = source, every_s
        self.notice: str | None = None
        self._look = LOOKS.get(source, lambda: at_url(source))
        self._has_ended = threading.Event()

    def start(self) -> None:
        """Begin to look."""
        self._has_ended.clear()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._has_ended.set()

    def _watch(self) -> None:
        complains_at: float | None = time.monotonic() + PATIENCE_S
        while self.notice is None and not self._has_ended.is_set():
            try:
                self.notice, complains_at = self._look(), None
            except (OSError, HTTPException, ValueError, LookupError) as error:  # none, or odd ones
                if complains_at is not None and time.monotonic() >= complains_at:
                    complains_at = None
                    self._say(
                        f"note: cluster.notice={self.source} -> it has not answered yet ({error}) "
                        "-> is this a machine of that cloud? Asking goes on"
                    )
            self._has_ended.wait(self.every_s)
        if self.notice is not None:
            self._say(f"cluster.notice={self.source}: {gethostname()} is to stop: {self.notice}")

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def at_url(url: str, **headers: str) -> str | None:
    """What a service says other than `FALSE`; None for that, and for 404."""
    body = _ask(url, **headers)
    return None if body is None or body.strip().upper() == "FALSE" else body.strip()


def of_aws() -> str | None:
    """The action that EC2 will take: 404 until two minutes before, then JSON.

    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html, and
    instancedata-data-retrieval.html there for the token that the service asks for in version 2.
    """
    token = _ask(
        f"{METADATA}/latest/api/token",
        method="PUT",
        **{"X-aws-ec2-metadata-token-ttl-seconds": "60"},
    )
    url = f"{METADATA}/latest/meta-data/spot/instance-action"
    return at_url(url, **{"X-aws-ec2-metadata-token": token or ""})


def of_gcp() -> str | None:
    """`TRUE` of a Compute Engine machine that is being preempted, `FALSE` before.

    https://cloud.google.com/compute/docs/instances/create-use-spot#detect-preemption
    """
    url = f"{METADATA}/computeMetadata/v1/instance/preempted"
    return at_url(url, **{"Metadata-Flavor": "Google"})


def of_azure() -> str | None:
    """The event that deletes this machine; those of its neighbours are in the same list.

    https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events: `Preempt` of Spot
    machines, 30 seconds ahead, and `Terminate` of scale sets. Pauses, reboots and moves are planned
    10 minutes or more ahead and do not delete it.
    """
    header = {"Metadata": "true"}
    query = "api-version=2020-07-01"
    events = json.loads(_ask(f"{METADATA}/metadata/scheduledevents?{query}", **header) or "{}")
    deleting = [e for e in events["Events"] if e["EventType"] in ("Preempt", "Terminate")]
    if not deleting:
        return None
    query = "api-version=2021-02-01&format=text"
    own_name = _ask(f"{METADATA}/metadata/instance/compute/name?{query}", **header)
    mine = [event for event in deleting if own_name in event["Resources"]]
    return f"{mine[0]['EventType']} not before {mine[0]['NotBefore']}" if mine else None


LOOKS: dict[str, Callable[[], str | None]] = {"aws": of_aws, "gcp": of_gcp, "azure": of_azure}


def _ask(url: str, method: str = "GET", **headers: str) -> str | None:
    """The body of an answer; None for 404.

    Raises:
        OSError: There is no answer, or one of another kind.
    """
    try:
        with _direct.open(Request(url, method=method, headers=headers), timeout=TIMEOUT_S) as reply:
            return reply.read().decode()
    except HTTPError as error:
        if error.code == 404:
            return None
        raise
