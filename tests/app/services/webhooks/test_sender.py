"""One request to a receiver: what it says, whom it trusts, and what a bad receiver can do."""

import asyncio
import ssl
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from app.services.webhooks import sender
from app.services.webhooks.address_guard import AddressGuard
from app.services.webhooks.sender import Answer, Message, send
from tests.app.services.webhooks.conftest import GUARD
from tests.webhook_receiver import Receiver, open_receiver

CERTIFICATE = Path(__file__).with_name("receiver.pem")  # of "localhost", and its own authority
MESSAGE = Message.of(
    "evt_1", "batch.completed", {"id": "batch_1"}, datetime(2026, 1, 1, tzinfo=UTC)
)


def post(url: str, guard: AddressGuard = GUARD, *, timeout_seconds: float = 10.0) -> Answer:
    secrets = ("whsec_AAAA",)
    return asyncio.run(send(guard, url, MESSAGE, secrets, timeout_seconds=timeout_seconds))


def test_a_request_names_the_host_and_not_the_address_it_connects_to(receiver: Receiver) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    port = receiver.server_address[1]
    guard = AddressGuard(["hooks.test"], resolve)
    answer = post(f"http://hooks.test:{port}/hook?key=a%20b", guard)
    assert (answer.status_code, answer.error) == (200, None)
    (received,) = receiver.received
    assert received.path == "/hook?key=a%20b"
    assert received.headers["host"] == f"hooks.test:{port}"
    assert received.headers["content-type"] == "application/json"
    assert received.event == {
        "id": "evt_1",
        "object": "event",
        "created_at": 1_767_225_600,
        "type": "batch.completed",
        "data": {"id": "batch_1"},
    }


def test_the_next_address_is_tried_if_the_first_refuses(receiver: Receiver) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.2", "127.0.0.1"]  # the receiver listens at the second alone

    guard = AddressGuard(["hooks.test"], resolve)
    assert post(f"http://hooks.test:{receiver.server_address[1]}/", guard).status_code == 200


def test_a_loopback_receiver_that_is_not_allowed_gets_nothing(receiver: Receiver) -> None:
    port = receiver.server_address[1]
    for host in ("localhost", "127.0.0.1", "2130706433"):
        for scheme in ("http", "https"):
            answer = post(f"{scheme}://{host}:{port}/", AddressGuard(["hooks.test"]))
            assert answer.status_code is None
            assert answer.error
    assert receiver.received == []


def test_redirects_are_not_followed(receiver: Receiver) -> None:
    receiver.status, receiver.headers = 307, {"location": receiver.url}
    answer = post(receiver.url)
    assert answer.status_code == 307
    assert answer.error == "the receiver answered with 307; redirects are not followed"
    assert len(receiver.received) == 1


def test_an_endless_answer_is_not_read(receiver: Receiver) -> None:
    def write_for_ever(stream: Any) -> None:
        with suppress(OSError):
            while True:
                stream.write(b"x" * 65_536)

    receiver.write_body = write_for_ever
    assert post(receiver.url).error is None


def test_an_endless_header_and_a_silent_receiver_end_with_the_time_limit(
    receiver: Receiver,
) -> None:
    receiver.headers = {"x-long": "y" * 300_000}
    too_long = post(receiver.url)
    assert too_long.error == "the receiver closed the connection or sent no valid HTTP response"
    with open_receiver(is_up=False) as silent:
        silent.server_activate()  # the kernel connects, and nothing is ever answered
        answer = post(silent.url, timeout_seconds=0.2)
        assert answer == Answer(None, "no response within 0.2 s", answer.duration_seconds)


def test_errors_repeat_nothing_that_the_receiver_has_sent(receiver: Receiver) -> None:
    receiver.headers = {"broken header": "a secret"}
    answer = post(receiver.url)
    assert answer.error
    assert "secret" not in answer.error
    assert "header" not in answer.error


@pytest.fixture
def tls_receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Receiver, list[str | None]]]:
    """A receiver with TLS that the service trusts, and the names that clients have asked it for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    names: list[str | None] = []
    context.sni_callback = lambda _socket, name, _context: names.append(name)
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    sender._tls_context.cache_clear()
    with open_receiver(context) as receiver:
        yield receiver, names
    sender._tls_context.cache_clear()


def test_the_certificate_must_be_of_the_host_although_the_address_is_connected_to(
    tls_receiver: tuple[Receiver, list[str | None]],
) -> None:
    receiver, names = tls_receiver
    assert post(receiver.url).status_code == 200
    assert names == ["localhost"]
    (received,) = receiver.received
    assert received.headers["host"] == receiver.url.split("/")[2]

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    answer = post(
        receiver.url.replace("localhost", "evil.test"), AddressGuard(["evil.test"], resolve)
    )
    assert answer.status_code is None
    assert answer.error
    assert "certificate" in answer.error.lower()
    assert len(receiver.received) == 1
