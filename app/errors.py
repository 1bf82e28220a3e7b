"""Errors of the control plane; `app/main.py` turns each into the OpenAI envelope.

StillhouseError
├── BadRequest            400  invalid_request_error
├── Unauthenticated       401  authentication_error
├── Forbidden             403  permission_error
├── NotFound              404  invalid_request_error
├── Conflict              409  conflict_error (the SDK must not retry)
├── InProgress            409  conflict_error (retry soon)
├── TooLarge              413  invalid_request_error
├── Unprocessable         422  invalid_request_error
├── TooManyRequests       429  rate_limit_error, with Retry-After
│   └── QuotaExceeded         (waiting alone does not help: the SDK must not retry)
├── Unavailable           503  server_error, with Retry-After
└── TimedOut              504  server_error
"""


class StillhouseError(Exception):
    """Base of all errors a caller may see; `message` says what to do next."""

    status = 500
    type = "server_error"
    code = "internal_error"
    retry_after_seconds: int | None = None
    should_retry: bool | None = None

    def __init__(self, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message, code, param)
        self.message = message
        self.code = code or type(self).code
        self.param = param


class BadRequest(StillhouseError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class Unauthenticated(StillhouseError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(StillhouseError):
    status = 403
    type = "permission_error"
    code = "insufficient_scope"


class NotFound(StillhouseError):
    status = 404
    type = "invalid_request_error"
    code = "resource_not_found"


class Conflict(StillhouseError):
    status = 409
    type = "conflict_error"
    code = "invalid_state_transition"
    should_retry = False


class InProgress(StillhouseError):
    status = 409
    type = "conflict_error"
    code = "idempotency_in_progress"
    retry_after_seconds = 1
    should_retry = True


class TooLarge(StillhouseError):
    status = 413
    type = "invalid_request_error"
    code = "file_too_large"


class Unprocessable(StillhouseError):
    status = 422
    type = "invalid_request_error"
    code = "idempotency_key_reused"


class TooManyRequests(StillhouseError):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    retry_after_seconds = 2


class QuotaExceeded(TooManyRequests):
    code = "quota_exceeded"
    retry_after_seconds = 60
    should_retry = False


class Unavailable(StillhouseError):
    status = 503
    type = "server_error"
    code = "engine_overloaded"
    retry_after_seconds = 2


class TimedOut(StillhouseError):
    status = 504
    type = "server_error"
    code = "request_timeout"
    should_retry = False  # it took all its time, and would again


def envelope(error: StillhouseError) -> dict[str, dict[str, str | None]]:
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        },
    }
