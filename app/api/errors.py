"""Error handlers, which return every error in the format of OpenAI.

The body is `{"error": {"message", "type", "param", "code"}}`.
"""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import iter_route_contexts
from starlette.exceptions import HTTPException
from starlette.routing import Match

from app.db.pagination import UnknownCursor
from app.db.session import DatabaseUnavailable, PoolExhausted
from app.errors import (
    BadRequest,
    Conflict,
    NotFound,
    StillhouseError,
    TooLarge,
    Unauthenticated,
    Unavailable,
    envelope,
)
from app.schemas.validation_errors import bad_request

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


def install(app: FastAPI) -> None:
    """Registers the error handlers with the app."""
    app.add_exception_handler(StillhouseError, _known)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(UnknownCursor, _cursor)
    app.add_exception_handler(DatabaseUnavailable, _database)
    app.add_exception_handler(PoolExhausted, _database)


def error_response(error: StillhouseError) -> JSONResponse:
    """Returns the response for an error, with the headers that clients read before a retry."""
    headers: dict[str, str] = {}
    if error.retry_after_seconds is not None:
        headers["retry-after"] = str(error.retry_after_seconds)
    if error.retry_after_milliseconds is not None:
        headers["retry-after-ms"] = str(error.retry_after_milliseconds)
    if error.should_retry is not None:
        headers["x-should-retry"] = "true" if error.should_retry else "false"
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(envelope(error), error.status, headers)


async def _known(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StillhouseError)
    return error_response(error)


async def _cursor(request: Request, error: Exception) -> JSONResponse:
    return error_response(
        BadRequest(f"nothing in this list has the id {error.args[0]!r}", param="after")
    )


async def _database(request: Request, error: Exception) -> JSONResponse:
    return error_response(
        Unavailable("the database does not answer; try again soon", "database_unavailable")
    )


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return error_response(
            NotFound(f"unknown URL: {where}; /openapi.json lists all endpoints", "unknown_url")
        )
    answer: StillhouseError = BadRequest(str(error.detail))
    if error.status_code == 405:
        answer = BadRequest(
            f"method not allowed: {where}; /openapi.json lists the allowed methods",
            "method_not_allowed",
        )
        answer.status = 405
    elif error.status_code == 413:
        answer = TooLarge(str(error.detail), "body_too_large")
    elif error.status_code == 409:
        answer = Conflict(str(error.detail))
    response = error_response(answer)
    response.headers.update(error.headers or {})
    if error.status_code == 405:
        response.headers["allow"] = _allowed(request)
    return response


def _allowed(request: Request) -> str:
    """Returns the methods of all routes with this path; Starlette names those of the first only.

    A path without parameters has its own methods only, also if a path with parameters matches it.
    """
    routes = [
        route
        for route in iter_route_contexts(request.app.routes)
        if route.matches(request.scope)[0] is not Match.NONE
    ]
    paths = [route.path for route in routes]
    own = request.scope["path"] if request.scope["path"] in paths else paths[0]
    methods = {name for route in routes if route.path == own for name in route.methods or ()}
    return ", ".join(method for method in METHODS if method in methods)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return error_response(bad_request(error.errors(), error.body))
