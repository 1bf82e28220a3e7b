"""Sends one request to a receiver, within limits of time and size."""

import asyncio
import ssl
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Final

import httpx
import orjson

from app.db.schema.table import Json
from app.services.webhooks.address_guard import (
    AddressGuard,
    CheckedTarget,
    ForbiddenUrl,
    UnknownHost,
)
from app.services.webhooks.schedule import retry_after_of
from app.services.webhooks.signatures import signed_headers
from app.settings import get_settings

TIMEOUT_SECONDS: Final = 15.0  # for the complete attempt, with the resolution of the name
CONNECT_SECONDS: Final = 5.0  # per address
MAX_ADDRESSES: Final = 3
MAX_ERROR_CHARACTERS: Final = 300


@dataclass(frozen=True)
class Message:
    """An event as it is sent. Its bytes are the same in all attempts."""

    id: str
    body: bytes

    @classmethod
    def of(cls, event_id: str, event_type: str, data: Json, created_at: datetime) -> "Message":
        body = {
            "id": event_id,
            "object": "event",
            "created_at": int(created_at.timestamp()),
            "type": event_type,
            "data": data,
        }
        return cls(event_id, orjson.dumps(body))


@dataclass(frozen=True)
class Answer:
    """Outcome of one request. `status_code` is None if there was no response.

    `error` is None after a success. It never contains anything that the receiver has sent, except
    for the status code.
    """

    status_code: int | None
    error: str | None
    duration_seconds: float
    retry_after_seconds: float | None = None


def webhook_guard() -> AddressGuard:
    """Returns the guard of webhook receivers, with the hosts that the settings allow."""
    return AddressGuard(get_settings().webhook_allowed_hosts.replace(",", " ").split())


async def send(
    guard: AddressGuard,
    url: str,
    message: Message,
    signing_secrets: tuple[str, ...],
    *,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Answer:
    """Sends a signed message to a receiver and returns the outcome. Never raises.

    The request connects to a checked address and follows no redirects. The body of the response is
    not read.
    """
    began = time.monotonic()
    status_code, header = None, None
    try:
        async with asyncio.timeout(timeout_seconds):
            targets = await guard.check(url)
            status_code, header = await _post(targets[:MAX_ADDRESSES], message, signing_secrets)
        error = None if 200 <= status_code < 300 else f"the receiver answered with {status_code}"
        if 300 <= status_code < 400:
            error = f"{error}; redirects are not followed"
    except TimeoutError:
        error = f"no response within {timeout_seconds:g} s"
    except ForbiddenUrl as forbidden:
        error = forbidden.message
    except UnknownHost as unknown:
        error = str(unknown)
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as failed:
        error = _describe(failed)
    retry_after = retry_after_of(status_code, header, datetime.now(UTC)) if status_code else None
    return Answer(
        status_code,
        error[:MAX_ERROR_CHARACTERS] if error else None,
        time.monotonic() - began,
        retry_after,
    )


async def _post(
    targets: list[CheckedTarget], message: Message, signing_secrets: tuple[str, ...]
) -> tuple[int, str | None]:
    """Returns the status code and the header Retry-After of the first target that is reachable."""
    headers = {
        "content-type": "application/json",
        "user-agent": "Stillhouse-Webhooks/1",
        "connection": "close",
    }
    headers |= signed_headers(
        message.body,
        message_id=message.id,
        timestamp=int(time.time()),
        signing_secrets=signing_secrets,
    )
    # A client per request: a connection to one host must not be used for another host that has the
    # same address, because the certificate was checked for the first host only.
    timeout = httpx.Timeout(TIMEOUT_SECONDS, connect=CONNECT_SECONDS)
    async with httpx.AsyncClient(
        verify=_tls_context(), timeout=timeout, follow_redirects=False, trust_env=False
    ) as client:
        for number, target in enumerate(targets, 1):
            request = client.build_request(
                "POST",
                target.url,
                content=message.body,
                headers=headers | target.headers,
                extensions=target.extensions,
            )
            try:
                response = await client.send(request, stream=True)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                if number == len(targets):
                    raise
                continue
            await response.aclose()
            return response.status_code, response.headers.get("retry-after")
    raise AssertionError("a host has at least one address")


def _describe(error: Exception) -> str:
    """Returns the reason of a failed request, without anything that the receiver has sent."""
    if isinstance(error, httpx.ConnectError):
        return f"the connection failed: {error}"
    if isinstance(error, httpx.TimeoutException):
        return "the receiver did not respond in time"
    return "the receiver closed the connection or sent no valid HTTP response"


@cache
def _tls_context() -> ssl.SSLContext:
    """Returns the TLS configuration, which trusts the authorities of SSL_CERT_FILE if it is set."""
    return httpx.create_ssl_context()
