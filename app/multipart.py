"""Headers of the parts of a multipart body, collected from the callbacks of its parser."""

from typing import TYPE_CHECKING, Final

from python_multipart.multipart import parse_options_header

from app.errors import BadRequest

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks  # defined for type checkers only

MAX_HEADER_BYTES: Final = 8192  # of one part


class PartHeaders:
    """Headers of the current part. Call `clear` when a part begins."""

    def __init__(self) -> None:
        self._pieces = (bytearray(), bytearray())
        self._headers: dict[bytes, bytes] = {}
        self._num_bytes = 0

    def clear(self) -> None:
        self._pieces = (bytearray(), bytearray())
        self._headers, self._num_bytes = {}, 0

    def callbacks(self) -> "MultipartCallbacks":
        """Returns the callbacks of the parser that collect the headers."""
        return {
            "on_header_begin": lambda: None,
            "on_header_field": lambda *piece: self._take(0, *piece),
            "on_header_value": lambda *piece: self._take(1, *piece),
            "on_header_end": self._end,
        }

    def option(self, name: bytes) -> bytes:
        """Returns `name` or `filename` of the part, empty if it has none."""
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        return options.get(name, b"")

    def _take(self, side: int, data: bytes, start: int, end: int) -> None:
        self._num_bytes += end - start
        if self._num_bytes > MAX_HEADER_BYTES:
            raise BadRequest("the headers of a part are too long", "invalid_file", "file")
        self._pieces[side].extend(data[start:end])

    def _end(self) -> None:
        field, value = self._pieces
        self._headers[bytes(field).lower()] = bytes(value)
        self._pieces = (bytearray(), bytearray())
