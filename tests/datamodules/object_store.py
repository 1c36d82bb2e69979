"""An S3 server on loopback (moto's), in front of which chosen requests can be made to fail."""

import os
import socket
import struct
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any
from urllib.request import Request, urlopen

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

CREDENTIALS = {"key": "nobody", "secret": "none"}
BUCKET = "shards"
SLOW_S = 30.0  # far beyond any timeout of a test; ends when the server is closed

Answer = Iterable[bytes]


class _QuietHandler(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        pass

    def connection_dropped(self, error: BaseException, environ: Any = None) -> None:
        self.close_connection = True


class ObjectStore:
    """Serves S3, and the same objects over plain HTTP, at `endpoint`.

    Attributes:
        faults: key -> names of what happens to its next reads, in turn.
        reads: key -> number of its ranges asked for, faults included.
        stalls: whether the upload of a key is to stop in the middle, for good.
        stalled: set once one has.
    """

    def __init__(self) -> None:
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.reads: Counter[str] = Counter()
        self.stalls: Callable[[str], bool] = lambda key: False
        self.stalled = threading.Event()
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._closing = threading.Event()
        self._server = make_server(
            "127.0.0.1", 0, self._answer, threaded=True, request_handler=_QuietHandler
        )
        self.endpoint = f"http://127.0.0.1:{self._server.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.options = {**CREDENTIALS, "endpoint_url": self.endpoint}
        self._client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=CREDENTIALS["key"],
            aws_secret_access_key=CREDENTIALS["secret"],
            region_name="us-east-1",
        )
        # moto keeps objects for the process, of servers before, too.
        urlopen(Request(f"{self.endpoint}/moto-api/reset", method="POST")).close()
        self._client.create_bucket(Bucket=BUCKET)

    def put(self, key: str, content: bytes) -> str:
        """Store an object that everyone may read; gives its s3 url."""
        self._client.put_object(Bucket=BUCKET, Key=key, Body=content, ACL="public-read")
        return f"s3://{BUCKET}/{key}"

    def close(self) -> None:
        self._closing.set()
        self._client.close()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Answer:
        key = environ["PATH_INFO"].removeprefix(f"/{BUCKET}/")
        if environ["REQUEST_METHOD"] == "PUT" and self.stalls(key):
            return self._stall(environ)
        if environ["REQUEST_METHOD"] != "GET":
            return self._moto(environ, start_response)
        self.reads[key] += 1
        if not self.faults[key]:
            return self._moto(environ, start_response)
        fault = self.faults[key].pop(0)
        return getattr(self, f"_{fault}")(environ, start_response)

    def _stall(self, environ: dict[str, Any]) -> Answer:
        environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]) // 2)
        self.stalled.set()
        self._closing.wait(SLOW_S)
        raise ConnectionResetError  # nothing has been stored

    def _unavailable(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Answer:
        body = b"<Error><Code>SlowDown</Code><Message>Please reduce your rate.</Message></Error>"
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        start_response("503 Service Unavailable", headers)
        return [body]

    def _too_many(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Answer:
        start_response("429 Too Many Requests", [("Content-Length", "0")])
        return []

    def _forbidden(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Answer:
        body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        start_response("403 Forbidden", headers)
        return [body]

    def _slow(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Answer:
        self._closing.wait(SLOW_S)
        return self._moto(environ, start_response)

    def _reset(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Answer:
        connection: socket.socket = environ["werkzeug.socket"]
        # Closed without lingering, a connection is reset rather than ended.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(connection.detach())
        raise ConnectionResetError

    def _truncated(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Answer:
        """Half of the body, and then the end of the connection."""
        body = b"".join(self._moto(environ, start_response))
        return [body[: len(body) // 2]]

    def _corrupt(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Answer:
        body = bytearray(b"".join(self._moto(environ, start_response)))
        body[len(body) // 3] ^= 1
        return [bytes(body)]

    def _whole(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Answer:
        """All of the object, as by a server that does not know ranges."""
        environ.pop("HTTP_RANGE")
        return self._moto(environ, start_response)
