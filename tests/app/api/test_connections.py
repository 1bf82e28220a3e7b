"""Connections that say nothing, or half of something, do not stay."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn

from app.api import connections
from app.api.connections import BoundedProtocol
from tests.waiting import wait_for

REQUEST = b"GET / HTTP/1.1\r\nhost: here\r\n\r\n"


async def application(scope: dict[str, object], receive: object, send: object) -> None:
    assert callable(send)
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 204})
        await send({"type": "http.response.body"})


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)
    config = uvicorn.Config(
        application, port=0, http=BoundedProtocol, lifespan="off", log_config=None
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started, 10, "the server did not start")
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(10)


@pytest.mark.parametrize(
    "said",
    [b"", REQUEST[:20], REQUEST + REQUEST[:20], REQUEST + b"\r\n"],
    ids=["silent", "half", "second half", "a blank line behind"],
)
def test_a_connection_without_whole_headers_is_closed(port: int, said: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(said[: len(REQUEST)])
        heard = connection.recv(4096) if said.startswith(REQUEST) else b""
        connection.sendall(said[len(REQUEST) :])
        while piece := connection.recv(4096):
            heard += piece
    assert heard.count(b"204") == said.count(REQUEST)


def test_a_connection_that_has_asked_stays(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        for _ in range(2):
            connection.sendall(REQUEST)
            assert b"204" in connection.recv(4096)
            time.sleep(0.6)
