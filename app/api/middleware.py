"""ASGI middleware: request ids, timing, limit of the body size, metrics, and unhandled errors."""

import secrets
import time

import structlog
from prometheus_client import Counter, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import error_response
from app.errors import BadRequest, StillhouseError, TooLarge
from app.tracing.spans import current_span, is_tracing, start_span, traceparent_of

log = structlog.get_logger(__name__)

OPENAI_VERSION = "2020-10-01"  # of the API whose format the responses have
UNTRACED_PATHS = frozenset({"/metrics", "/health/live", "/health/ready"})
UPLOAD_PATHS = frozenset({"/v1/files", "/v1/models/imports"})  # they have their own, larger limits
requests_total = Counter(
    "stillhouse_http_requests", "Requests answered", ["method", "route", "status"]
)
request_seconds = Histogram(
    "stillhouse_http_request_seconds", "Time to the first byte of a response", ["method", "route"]
)


class RequestFrame:
    """Middleware around the whole app.

    It gives each request an id, limits the body size, adds headers to the response, counts requests
    and turns unhandled errors into responses.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, *, logs_requests: bool = False) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.logs_requests = logs_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        await _Exchange(self, scope, receive, send).run()


class _Exchange:
    """State of one request while the middleware handles it."""

    def __init__(self, frame: RequestFrame, scope: Scope, receive: Receive, send: Send) -> None:
        self.frame, self.scope, self._receive, self._send = frame, scope, receive, send
        self.id = f"req_{secrets.token_hex(12)}"
        self.began = time.perf_counter()
        self.status = 0
        self.seconds: float | None = None  # time to the first byte
        self.num_bytes = 0
        self.is_capped = not (scope["method"] == "POST" and scope["path"] in UPLOAD_PATHS)
        scope.setdefault("state", {})["request_id"] = self.id
        self.span = None
        if is_tracing() and scope["path"] not in UNTRACED_PATHS:
            self.span = start_span(
                scope["method"],
                "server",
                {"http.request.method": scope["method"], "stillhouse.request_id": self.id},
                parent=Headers(scope=scope).get("traceparent"),
            )

    async def run(self) -> None:
        ids = {"request_id": self.id}
        if (traceparent := traceparent_of(self.span)) is not None:
            ids["trace"] = traceparent.split("-")[1]
        with structlog.contextvars.bound_contextvars(**ids), current_span(self.span):
            try:
                self.check()
                await self.frame.app(self.scope, self.receive, self.send)
            except ClientDisconnect:
                log.info("client_left", path=self.scope["path"])
            except StillhouseError as error:
                await self.answer(error)
            except Exception:
                log.exception("request_failed", path=self.scope["path"])
                if self.status:
                    raise  # the response has begun; only a closed connection can signal the error
                opaque = StillhouseError(
                    f"internal server error; include {self.id} when you report it"
                )
                await self.answer(opaque)
            finally:
                self.count()
                self.describe_span()
                if self.frame.logs_requests:
                    self.log_end()

    def check(self) -> None:
        if "\x00" in self.scope["path"] or b"%00" in self.scope["query_string"]:
            raise BadRequest("the URL contains a NUL character")
        length = dict(self.scope["headers"]).get(b"content-length", b"")
        if self.is_capped and length.isdigit() and int(length) > self.frame.max_body_bytes:
            raise self.too_large()

    def too_large(self) -> TooLarge:
        return TooLarge(
            f"the request body is larger than {self.frame.max_body_bytes:,} bytes", "body_too_large"
        )

    async def answer(self, error: StillhouseError) -> None:
        if not self.status:
            response: Response = error_response(error)
            await response(self.scope, self._receive, self.send)

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request" and self.is_capped:
            self.num_bytes += len(message.get("body", b""))
            if self.num_bytes > self.frame.max_body_bytes:
                # An HTTPException, because FastAPI reports any other error as an unreadable body.
                raise HTTPException(413, self.too_large().message)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.id
            headers["x-content-type-options"] = "nosniff"
            headers["openai-version"] = OPENAI_VERSION
            if (principal := self.scope["state"].get("principal")) is not None:
                headers["openai-organization"] = principal.project_id
            headers.update(self.scope["state"].get("rate_limit_headers", {}))
            self.seconds = time.perf_counter() - self.began
            headers["openai-processing-ms"] = str(round(self.seconds * 1000))
        await self._send(message)

    def route(self) -> str:
        """Returns the path template of the route, so that ids do not become metric labels."""
        return str(getattr(self.scope.get("route"), "path", "unmatched"))

    def count(self) -> None:
        if self.seconds is not None:
            request_seconds.labels(self.scope["method"], self.route()).observe(self.seconds)
        requests_total.labels(self.scope["method"], self.route(), str(self.status)).inc()

    def describe_span(self) -> None:
        if self.span is not None:
            self.span.update_name(f"{self.scope['method']} {self.route()}")
            self.span.set_attribute("http.route", self.route())
            self.span.set_attribute("http.response.status_code", self.status)

    def log_end(self) -> None:
        """Logs one line. A generation request has bound the id of its answer to the context."""
        log.info(
            "request",
            method=self.scope["method"],
            route=self.route(),
            status=self.status,
            first_byte_seconds=self.seconds and round(self.seconds, 4),
            seconds=round(time.perf_counter() - self.began, 4),
        )
