"""Downloads that can be resumed: responses with one range of a file (RFC 9110, section 14)."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header, Response
from fastapi.responses import StreamingResponse

from app.api.errors import error_response
from app.errors import RangeNotSatisfiable

# One range. The number of digits is limited because Python refuses to parse very long numbers.
ONE_RANGE = re.compile(r"bytes=(?P<first>[0-9]{0,19})-(?P<last>[0-9]{0,19})", re.IGNORECASE)


@dataclass(frozen=True)
class RequestedRange:
    """The headers of a request for a part of a file."""

    range: str | None
    if_range: str | None


def read_headers(
    range_header: Annotated[str | None, Header(alias="range")] = None,
    if_range: Annotated[str | None, Header()] = None,
) -> RequestedRange:
    """Reads the headers that request a part of a file."""
    return RequestedRange(range_header, if_range)


RangeHeaders = Annotated[RequestedRange, Depends(read_headers)]


def file_response(
    requested: RequestedRange,
    read: Callable[[range], Iterator[bytes]],
    *,
    num_bytes: int,
    sha256: str,
) -> Response:
    """Returns the response to a download: 200 with the file, 206 with a part of it, or 416.

    `read` yields the bytes at the given positions. The ETag is the SHA-256 of the file.
    """
    headers = {
        "accept-ranges": "bytes",
        "content-disposition": "attachment",
        "etag": f'"{sha256}"',
    }
    span = None
    if requested.if_range is None or requested.if_range == headers["etag"]:
        span = find_span(requested.range, num_bytes)
    if span is not None and not span:
        refusal = error_response(
            RangeNotSatisfiable(
                f"the range {requested.range!r} is outside the file, which has {num_bytes:,} bytes",
                param="range",
            )
        )
        refusal.headers["content-range"] = f"bytes */{num_bytes}"
        return refusal
    if span is not None:
        headers["content-range"] = f"bytes {span.start}-{span.stop - 1}/{num_bytes}"
    status = 200 if span is None else 206
    span = range(num_bytes) if span is None else span
    headers["content-length"] = str(len(span))
    return StreamingResponse(
        read(span), status, headers=headers, media_type="application/octet-stream"
    )


def find_span(range_header: str | None, num_bytes: int) -> range | None:
    """Returns the positions that a `Range` header names in a file of `num_bytes` bytes.

    An empty span means that the range is outside the file. None means the complete file: the header
    is missing, is malformed, or names several ranges. The RFC allows servers to ignore these.
    """
    match = ONE_RANGE.fullmatch(range_header or "")
    if match is None or match[0].endswith("=-"):
        return None
    if not match["first"]:  # the last n bytes
        return range(max(0, num_bytes - int(match["last"])), num_bytes)
    first = int(match["first"])
    last = int(match["last"]) if match["last"] else num_bytes - 1
    if match["last"] and last < first:
        return None
    return range(first, min(last + 1, num_bytes))
