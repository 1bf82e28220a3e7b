"""The proxy does to a connection what it says."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.faults.proxy import Link, Network


@pytest.fixture
def link() -> Iterator[Link]:
    """A link to a server that answers what it hears."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                peer, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=echo, args=(peer,), daemon=True).start()

    def echo(peer: socket.socket) -> None:
        with peer:
            try:
                while chunk := peer.recv(100):
                    peer.sendall(chunk)
            except OSError:
                return

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    network = Network()
    yield network.add("client-echo", server.getsockname()[1])
    network.close()
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join(5)


def connect(link: Link) -> socket.socket:
    return socket.create_connection(("127.0.0.1", link.port), timeout=5)


def test_what_is_sent_arrives(link: Link) -> None:
    with connect(link) as client:
        client.sendall(b"one")
        assert client.recv(100) == b"one"


def test_a_black_hole_keeps_what_is_sent_until_it_is_healed(link: Link) -> None:
    with connect(link) as client:
        client.sendall(b"one")
        assert client.recv(100) == b"one"
        link.blackhole()
        client.sendall(b"two")
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.recv(100)
        link.heal()
        client.settimeout(5)
        assert client.recv(100) == b"two"


def test_a_reset_ends_the_connection_and_every_new_one(link: Link) -> None:
    with connect(link) as client:
        client.sendall(b"one")
        assert client.recv(100) == b"one"
        link.reset()
        with pytest.raises(ConnectionResetError):
            client.recv(100)
    with (
        pytest.raises(ConnectionResetError),
        connect(link) as client,
    ):  # it may come while connecting
        client.recv(100)
    link.heal()
    with connect(link) as client:
        client.sendall(b"three")
        assert client.recv(100) == b"three"


def test_a_slow_link_takes_its_time_each_way(link: Link) -> None:
    with connect(link) as client:
        link.delay(0.2)
        began = time.monotonic()
        client.sendall(b"one")
        assert client.recv(100) == b"one"
        assert time.monotonic() - began >= 0.4
