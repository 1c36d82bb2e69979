"""Each cloud's metadata service as its documentation describes it, played by a server of ours."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from trainers import spot_notices
from trainers.spot_notices import LOOKS, SpotNotices

AWS_ACTION = '{"action": "terminate", "time": "2026-09-18T08:22:00Z"}'
OWN_NAME = "workers_7"


class Metadata(BaseHTTPRequestHandler):
    """Answers as the clouds do, and refuses what they refuse."""

    is_taken_away = False
    events: tuple[dict, ...] = ()

    def do_PUT(self):
        asked = self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        is_token = self.path == "/latest/api/token" and 1 <= int(asked or 0) <= 21600
        self._reply(*((200, "a-token") if is_token else (400, "")))

    def do_GET(self):
        if self.path.startswith("/latest/"):
            self._reply(*self._aws())
        elif self.path == "/computeMetadata/v1/instance/preempted":
            is_asked_well = self.headers["Metadata-Flavor"] == "Google"
            self._reply(*((200, str(self.is_taken_away).upper()) if is_asked_well else (403, "")))
        elif self.path.startswith("/metadata/"):
            self._reply(*(self._azure() if self.headers["Metadata"] == "true" else (400, "")))
        else:
            self._reply(404, "")

    def _aws(self):
        if self.headers["X-aws-ec2-metadata-token"] != "a-token":
            return 401, ""
        is_there = self.is_taken_away and self.path.endswith("/meta-data/spot/instance-action")
        return (200, AWS_ACTION) if is_there else (404, "")

    def _azure(self):
        if self.path.startswith("/metadata/instance/compute/name?api-version="):
            return 200, OWN_NAME
        return 200, json.dumps({"DocumentIncarnation": 1, "Events": [*self.events]})

    def _reply(self, code, body):
        self.send_response(code)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format, *args):
        """Say nothing of each request."""


@pytest.fixture
def metadata(monkeypatch):
    """A class whose attributes decide what the service says; a new one each time."""
    handler = type("OwnMetadata", (Metadata,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(spot_notices, "METADATA", f"http://127.0.0.1:{server.server_port}")
        yield handler
        server.shutdown()


@pytest.mark.parametrize(("cloud", "notice"), [("aws", AWS_ACTION), ("gcp", "TRUE")])
def test_notice_is_there_once_the_machine_is_taken_away(metadata, cloud, notice):
    assert LOOKS[cloud]() is None
    metadata.is_taken_away = True
    assert LOOKS[cloud]() == notice


def test_azure_deletes_this_machine_only_where_an_event_names_it(metadata):
    def event(kind, *machines):
        return {"EventType": kind, "Resources": [*machines], "NotBefore": "19:30"}

    metadata.events = (event("Preempt", "workers_1"), event("Reboot", OWN_NAME))
    assert LOOKS["azure"]() is None
    metadata.events += (event("Preempt", "workers_2", OWN_NAME),)
    assert LOOKS["azure"]() == "Preempt not before 19:30"


def test_url_of_ones_own_gives_notice_by_any_other_body_than_false(metadata):
    url = f"{spot_notices.METADATA}/computeMetadata/v1/instance/preempted"
    assert spot_notices.at_url(url, **{"Metadata-Flavor": "Google"}) is None
    assert spot_notices.at_url(f"{spot_notices.METADATA}/nothing") is None  # 404
    with pytest.raises(OSError, match="403"):
        spot_notices.at_url(url)


def test_service_that_does_not_answer_is_said_once_and_asked_again(monkeypatch, capsys):
    answers, looked = iter([OSError("nobody"), KeyError("odd"), "TRUE"]), threading.Event()

    def look():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        looked.set()
        return answer

    monkeypatch.setattr(spot_notices, "PATIENCE_S", 0.0)
    monkeypatch.setitem(LOOKS, "gcp", look)
    notices = SpotNotices("gcp", every_s=0.01)
    notices.start()
    assert looked.wait(timeout=30)
    notices._thread.join()
    assert notices.notice == "TRUE"
    printed = capsys.readouterr().err
    assert printed.count("cluster.notice=gcp -> it has not answered yet") == 1
    assert "is to stop: TRUE" in printed
