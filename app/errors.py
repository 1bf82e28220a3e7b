"""Errors of the control plane; `app/api/errors.py` turns them into HTTP responses.

The response body is the error envelope of the OpenAI API. HTTP status and `type` of each error:

- BadRequest            400  invalid_request_error
- Unauthenticated       401  invalid_request_error
- Forbidden             403  permission_error
- NotFound              404  invalid_request_error
- Conflict              409  conflict_error
- InProgress            409  conflict_error
- TooLarge              413  invalid_request_error
- RangeNotSatisfiable   416  invalid_request_error
- Unprocessable         422  invalid_request_error
- TooManyRequests       429  rate_limit_error
- QuotaExceeded         429  insufficient_quota (a subclass of TooManyRequests)
- Unavailable           503  server_error
- TimedOut              504  server_error
"""


class StillhouseError(Exception):
    """Base class of all errors that a client may see. `message` says what to do next.

    `retry_after_seconds` becomes the Retry-After header, and `retry_after_milliseconds` the more
    exact Retry-After-Ms. `should_retry` becomes the X-Should-Retry header. OpenAI SDKs obey all
    three. None leaves a header out.
    """

    status = 500
    type = "server_error"
    code = "internal_error"
    retry_after_seconds: int | None = None
    retry_after_milliseconds: int | None = None
    should_retry: bool | None = None

    def __init__(self, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message, code, param)
        self.message = message
        self.code = code or type(self).code
        self.param = param


class BadRequest(StillhouseError):
    """The request is invalid; `param` names the wrong field where there is one."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class Unauthenticated(StillhouseError):
    """The API key is missing or not valid."""

    status = 401
    type = "invalid_request_error"  # as OpenAI sends it
    code = "invalid_api_key"


class Forbidden(StillhouseError):
    """The API key lacks a scope that the request needs."""

    status = 403
    type = "permission_error"
    code = "insufficient_scope"


class NotFound(StillhouseError):
    """The object does not exist, or the project must not see it."""

    status = 404
    type = "invalid_request_error"
    code = "resource_not_found"


class Conflict(StillhouseError):
    """The state of an object does not allow the request. Clients must not retry it."""

    status = 409
    type = "conflict_error"
    code = "invalid_state_transition"
    should_retry = False


class InProgress(StillhouseError):
    """A request with the same Idempotency-Key is in progress. Clients should retry soon."""

    status = 409
    type = "conflict_error"
    code = "idempotency_in_progress"
    retry_after_seconds = 1
    should_retry = True


class TooLarge(StillhouseError):
    """An upload or a request body is too large."""

    status = 413
    type = "invalid_request_error"
    code = "file_too_large"


class RangeNotSatisfiable(StillhouseError):
    """The requested range of bytes begins after the end of the file."""

    status = 416
    type = "invalid_request_error"
    code = "range_not_satisfiable"


class Unprocessable(StillhouseError):
    """The Idempotency-Key was used before with a different body."""

    status = 422
    type = "invalid_request_error"
    code = "idempotency_key_reused"


class TooManyRequests(StillhouseError):
    """A rate or concurrency limit is reached. Clients should retry later."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    retry_after_seconds = 2


class QuotaExceeded(TooManyRequests):
    """A quota or a budget is used up. Retrying soon does not help, so clients must not retry."""

    type = "insufficient_quota"
    code = "insufficient_quota"
    retry_after_seconds = 60
    should_retry = False


class Unavailable(StillhouseError):
    """The service or a part of it cannot answer now. Clients should retry later."""

    status = 503
    type = "server_error"
    code = "engine_overloaded"
    retry_after_seconds = 2


class TimedOut(StillhouseError):
    """The request has exceeded its time limit."""

    status = 504
    type = "server_error"
    code = "request_timeout"
    should_retry = False  # a retry would probably time out too


def envelope(error: StillhouseError) -> dict[str, dict[str, str | None]]:
    """Returns the error as a response body in the format of the OpenAI API."""
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        },
    }
