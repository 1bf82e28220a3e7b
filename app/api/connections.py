"""HTTP connections whose request lines and headers end soon: uvicorn keeps whatever comes, before anybody is asked for a key."""

import asyncio
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.errors import BadRequest, envelope

MAX_HEADER_BYTES = 64 * 2**10  # as most servers have it
HEADER_SECONDS = 30.0  # for whoever connects without a key, and says nothing
HEADER_COST = 32  # bytes of memory that a header takes beside its text, at least


class BoundedProtocol(HttpToolsProtocol):
    """Ends a connection with 431 when line, headers, trailers or what is around chunks grow beyond the limit.

    One whose headers do not come to their end in time is closed.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:  # Any: uvicorn's own
        super().__init__(*arguments, **options)
        self._num_header_bytes = 0
        self._num_silent_bytes = 0  # taken in since the parser last gave something out
        self._patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn's own narrowing
        super().connection_made(transport)
        self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._num_silent_bytes += len(data)
        super().data_received(data)
        # What came may be half a request, or nothing of one: uvicorn's own timer ends with the first byte.
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and self._patience is None and self.timeout_keep_alive_task is None:
            self._wait_for_headers()
        is_over = max(self._num_silent_bytes, self._num_header_bytes) > MAX_HEADER_BYTES
        if is_over and not self.transport.is_closing():
            error = BadRequest(
                f"the headers are longer than {MAX_HEADER_BYTES:,} bytes", "headers_too_large"
            )
            body = orjson.dumps(envelope(error))
            head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            line = b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
            self.transport.write(line + head.encode() + body)
            self.transport.close()

    def on_message_begin(self) -> None:
        self._num_header_bytes = self._num_silent_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        super().on_headers_complete()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + HEADER_COST)
        super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._num_silent_bytes = 0
        super().on_body(body)

    def _wait_for_headers(self) -> None:
        self._patience = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _count(self, num_bytes: int) -> None:
        self._num_silent_bytes = 0
        self._num_header_bytes += num_bytes
