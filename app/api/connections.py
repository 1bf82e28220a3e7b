"""HTTP protocol class with limits on the size and the duration of request headers.

uvicorn alone buffers headers without limits, and it does so before the API key is checked.
"""

import asyncio
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.errors import BadRequest, envelope

MAX_HEADER_BYTES = 64 * 2**10
HEADER_SECONDS = 30.0  # within which a client must send complete headers
HEADER_COST = 32  # minimum bytes of memory that a header takes in addition to its text


class BoundedProtocol(HttpToolsProtocol):
    """Closes connections whose headers are too large or arrive too slowly.

    The size limit applies to the request line, headers, trailers and chunk framing. The response to
    a request above the limit is 431.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:  # Any: uvicorn's own types
        super().__init__(*arguments, **options)
        self._num_header_bytes = 0
        self._num_silent_bytes = 0  # received since the parser's last callback
        self._patience: asyncio.TimerHandle | None = None

    # The override is an error because uvicorn narrows the type of the transport, too.
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._num_silent_bytes += len(data)
        super().data_received(data)
        # The request may be incomplete. uvicorn's own timer stops at the first byte of it.
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
