"""A real HTTP server on loopback that keeps what it receives and answers as a test wants."""

import json
import socketserver
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any

WAIT_SECONDS = 30


@dataclass(frozen=True)
class Received:
    """One request."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def event(self) -> dict[str, Any]:  # Any: JSON
        event: dict[str, Any] = json.loads(self.body)
        return event

    @property
    def object_id(self) -> str:
        return str(self.event["data"]["id"])


class Receiver(socketserver.ThreadingTCPServer):
    """The server. Its port is its own from the beginning; it refuses connections until `listen`."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler, bind_and_activate=False)
        self.server_bind()
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_side=True)
        self.received: list[Received] = []
        self.status = 200
        self.headers: dict[str, str] = {}
        self.before_answer: Callable[[], object] = lambda: None
        self.write_body: Callable[[Any], None] = lambda stream: None  # Any: a binary stream
        self._has_news = threading.Condition()
        self._thread: threading.Thread | None = None
        scheme = "http" if tls is None else "https"
        self.url = f"{scheme}://localhost:{self.server_address[1]}/hook"

    def listen(self) -> None:
        self.server_activate()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        if self._thread is not None:
            self.shutdown()
            self._thread.join()

    def note(self, received: Received) -> None:
        with self._has_news:
            self.received.append(received)
            self._has_news.notify_all()

    def wait_for(self, count: int) -> list[Received]:
        """The requests, when there are so many."""
        with self._has_news:
            assert self._has_news.wait_for(lambda: len(self.received) >= count, WAIT_SECONDS)
            return list(self.received)

    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing about clients that hang up, as the tests of them want it."""


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.before_answer()
        self.server.note(Received(self.path, headers, body))
        self.send_response(self.server.status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.server.write_body(self.wfile)

    def log_message(self, *_: object) -> None:
        """Logs nothing."""


@contextmanager
def open_receiver(tls: ssl.SSLContext | None = None, *, is_up: bool = True) -> Iterator[Receiver]:
    """A receiver for the time of the block."""
    with Receiver(tls) as receiver:
        if is_up:
            receiver.listen()
        yield receiver
        receiver.stop()
