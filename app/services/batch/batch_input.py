"""Reads and validates the lines of a batch's input file, with the checks of the API routes."""

from collections.abc import Callable, Iterator
from typing import Final, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from app.db.session import transaction
from app.errors import BadRequest, StillhouseError
from app.json_limits import parse_limited, refuse_complex
from app.schemas.batches import BatchError, BatchRequest
from app.schemas.completions import ChatBody, CompletionBody
from app.schemas.validation_errors import bad_request
from app.services import generation, model_registry
from app.settings import Settings
from app.storage import store

Schema = TypeVar("Schema", bound=BaseModel)

PIECE_BYTES: Final = 2**20
MAX_REQUESTS: Final = 50_000  # as in the OpenAI API
MAX_FAULTS: Final = 100  # faults that are reported per file
BODIES: Final[dict[str, type[ChatBody] | type[CompletionBody]]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
}


def lines_from(key: str, offset: int, max_line_bytes: int) -> tuple[list[bytes], int]:
    """Returns some lines of a stored file from `offset` on, and the offset after them.

    The list is empty at the end of the file. Of a line of more than `max_line_bytes`, only the
    beginning may be returned, which is still too long.
    """
    with store().open(key) as file:
        file.seek(offset)
        piece, end, num_skipped = b"", 0, 0
        while not end and len(piece) <= max_line_bytes:
            more = file.read(PIECE_BYTES)
            piece += more
            end = piece.rfind(b"\n") + 1 if more else len(piece)
            if not more:
                break
        while not end and (more := file.read(PIECE_BYTES)):  # the rest of a line that is too long
            end = more.find(b"\n") + 1
            num_skipped += end or len(more)
    if not num_skipped:
        piece = piece[: end or len(piece)]
    lines = piece.removesuffix(b"\n").split(b"\n") if piece else []
    return lines, offset + len(piece) + num_skipped


def numbered_lines(key: str, max_line_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Yields the lines of a stored file with their numbers, which start at 1."""
    number = offset = 0
    while True:
        lines, offset = lines_from(key, offset, max_line_bytes)
        if not lines:
            return
        for raw in lines:
            number += 1
            yield number, raw


def parse_request(raw: bytes) -> BatchRequest:
    """Returns the request on a line of an accepted batch, without validating its body.

    The limits of `app.json_limits` do not apply, because the batch may be older than they are.
    Raises BadRequest.
    """
    return _validated(BatchRequest, _json(raw, orjson.loads))


def parse_new_request(raw: bytes) -> BatchRequest:
    """Returns the request on a line of a new batch, without validating its body.

    The limits of `app.json_limits` apply. Raises BadRequest.
    """
    content = _json(raw, parse_limited)
    refuse_complex(content)
    return _validated(BatchRequest, content)


def _json(raw: bytes, parse: Callable[[bytes], object]) -> object:
    try:
        return parse(raw)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the line is not valid JSON: {error.msg}", "invalid_json_line") from None


def body_of(request: BatchRequest, endpoint: str) -> ChatBody | CompletionBody:
    """Returns the validated body of a request to the batch's endpoint. Raises BadRequest."""
    if request.method != "POST":
        raise BadRequest("method must be POST", "invalid_method", "method")
    if request.url != endpoint:
        message = f"url must be the batch's endpoint, {endpoint}"
        raise BadRequest(message, "mismatched_endpoint", "url")
    body = _validated(BODIES[endpoint], _without_labels(request.body))
    if body.stream:
        raise BadRequest(
            "a batch does not support streaming; leave stream out",
            "unsupported_parameter",
            "stream",
        )
    generation.refuse_unsupported(body)
    return body


def find_faults(
    key: str, *, project_id: str, endpoint: str, settings: Settings
) -> tuple[int, list[BatchError], frozenset[str]]:
    """Returns the number of requests in an input file, its faults, and the models it names.

    There is at most one fault per line.

    Reading stops at the limits MAX_REQUESTS and MAX_FAULTS, and the number is then that of the
    lines read. Raises FileNotFoundError.
    """
    checker = _LineChecker(project_id, endpoint, settings.max_line_bytes)
    faults: list[BatchError] = []
    number = 0
    for number, raw in numbered_lines(key, settings.max_line_bytes):
        try:
            checker.demand_good(number, raw)
        except StillhouseError as fault:
            faults.append(
                BatchError(code=fault.code, line=number, message=fault.message, param=fault.param)
            )
        if number > MAX_REQUESTS or len(faults) == MAX_FAULTS:
            break
    return number, faults, frozenset(checker.models)


class _LineChecker:
    """Checks the lines of one file in order. It remembers ids and models of earlier lines."""

    def __init__(self, project_id: str, endpoint: str, max_line_bytes: int) -> None:
        self._project_id = project_id
        self._endpoint = endpoint
        self._max_line_bytes = max_line_bytes
        self._line_of: dict[str, int] = {}
        self.models: set[str] = set()

    def demand_good(self, number: int, raw: bytes) -> None:
        if number > MAX_REQUESTS:
            raise BadRequest(f"a batch has at most {MAX_REQUESTS:,} requests", "too_many_requests")
        if len(raw) > self._max_line_bytes:
            raise BadRequest(
                f"the line is longer than {self._max_line_bytes:,} bytes", "line_too_long"
            )
        request = parse_new_request(raw)
        first = self._line_of.setdefault(request.custom_id, number)
        if first != number:
            message = f"the custom_id {request.custom_id!r} is already used on line {first}"
            raise BadRequest(message, "duplicate_custom_id", "custom_id")
        model_id = body_of(request, self._endpoint).model
        if model_id not in self.models:
            with transaction() as session:
                model_registry.resolve(session, self._project_id, model_id)
            self.models.add(model_id)


def _without_labels(content: object) -> object:
    """Returns a body without `store` and `metadata`, which have no effect on the line of a batch.

    Older versions accepted any values of them, so lines that wait may have invalid ones.
    """
    if not isinstance(content, dict):
        return content
    return {name: value for name, value in content.items() if name not in ("store", "metadata")}


def _validated(schema: type[Schema], content: object) -> Schema:
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        details = [{**detail, "loc": ("body", *detail["loc"])} for detail in error.errors()]
        raise bad_request(details, content) from None
