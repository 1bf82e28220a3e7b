"""The HTTP body of every error."""

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """What went wrong; `code` is for programs, `message` says what to do next."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    error: ErrorDetail
