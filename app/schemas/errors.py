"""Response body of all errors."""

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """Description of an error. Programs should read `code`; `message` says what to do next."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    """Response body of an error, in the format of OpenAI."""

    error: ErrorDetail
