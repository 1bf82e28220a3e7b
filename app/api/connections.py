"""HTTP connections whose request lines and headers end soon: uvicorn keeps whatever comes, before anybody is asked for a key."""

from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.errors import BadRequest, envelope

MAX_HEADER_BYTES = 64 * 2**10  # as most servers have it
HEADER_COST = 32  # bytes of memory that a header takes beside its text, at least


class BoundedProtocol(HttpToolsProtocol):
    """Ends a connection with 431 when line, headers, trailers or what is around chunks grow beyond the limit."""

    def __init__(self, *arguments: Any, **options: Any) -> None:  # Any: uvicorn's own
        super().__init__(*arguments, **options)
        self._num_header_bytes = 0
        self._num_silent_bytes = 0  # taken in since the parser last gave something out

    def data_received(self, data: bytes) -> None:
        self._num_silent_bytes += len(data)
        super().data_received(data)
        is_over = max(self._num_silent_bytes, self._num_header_bytes) > MAX_HEADER_BYTES
        if is_over and not self.transport.is_closing():
            error = BadRequest(f"the headers are longer than {MAX_HEADER_BYTES:,} bytes", "headers_too_large")
            body = orjson.dumps(envelope(error))
            head = (
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            line = b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
            self.transport.write(line + head.encode() + body)
            self.transport.close()

    def on_message_begin(self) -> None:
        self._num_header_bytes = self._num_silent_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + HEADER_COST)
        super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._num_silent_bytes = 0
        super().on_body(body)

    def _count(self, num_bytes: int) -> None:
        self._num_silent_bytes = 0
        self._num_header_bytes += num_bytes
