"""Routes of /v1/completions and /v1/chat/completions, streamed or not."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Annotated, Any, TypeVar

import orjson
import structlog
from fastapi import APIRouter, Depends, Request, Response
from fastapi.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from app.api.deps import Principal, require
from app.api.openapi import whole_or_streamed
from app.api.strict_route import StrictRoute
from app.auth import claimed_key_id
from app.contracts.generation import Delta, Done
from app.errors import StillhouseError
from app.routing.reply_stream import ReplyStream
from app.routing.router import RequestRouter
from app.schemas.answers import ChatAnswer, TextAnswer
from app.schemas.completions import ChatBody, CompletionBody
from app.schemas.generated import ChatCompletion, TextCompletion
from app.schemas.responses.answer import ResponseAnswer
from app.services import generation
from app.services.generation import Order
from app.services.limits.meter import Meter
from app.services.traffic.recorder import Recorder, Recording


class AdmissionRoute(StrictRoute):
    """Route that checks admission before the API key is verified and the body is read.

    If the server is full, this refuses keys above their fair share at little cost. A client that
    claims the key of another client gains nothing, because the verification refuses it later.
    """

    def get_route_handler(
        self,
    ) -> Callable[[Request], Coroutine[Any, Any, Response]]:  # Any: FastAPI's own type
        handle = super().get_route_handler()

        async def admit_or_refuse(request: Request) -> Response:
            """Handles the request unless its key has no room. Raises as `demand_room` does."""
            request_router: RequestRouter = request.app.state.request_router
            request_router.admission.demand_room(
                claimed_key_id(request.headers.get("authorization"))
            )
            return await handle(request)

        return admit_or_refuse


router = APIRouter(prefix="/v1", tags=["generation"], route_class=AdmissionRoute)
log = structlog.get_logger(__name__)
Caller = Annotated[Principal, Depends(require("inference"))]
T = TypeVar("T")
Replies = list[tuple[int, Delta | Done]]
AnyAnswer = TextAnswer | ChatAnswer | ResponseAnswer

SLOW_CLIENT_SECONDS = 60.0  # a client that reads nothing for this long is disconnected
PIECE_BYTES = 256 * 1024
PING_SECONDS = 15.0
CLIENT_CLOSED_REQUEST = 499  # only for metrics, since the client is gone


class ClientGone(Exception):
    """The client disconnected, or stopped reading, before the response was complete."""


@router.post("/completions", responses=whole_or_streamed(TextCompletion))
async def create_completion(body: CompletionBody, request: Request, caller: Caller) -> Response:
    """Generates text after one or several prompts.

    With `stream`, the text is sent as server-sent events, and the last event is `[DONE]`.
    """
    return await respond(request, caller, body)


@router.post("/chat/completions", responses=whole_or_streamed(ChatCompletion))
async def create_chat_completion(body: ChatBody, request: Request, caller: Caller) -> Response:
    """Generates the next message of a chat.

    With `stream`, the message is sent as server-sent events, and the last event is `[DONE]`.
    """
    return await respond(request, caller, body)


async def respond(
    request: Request,
    caller: Principal,
    body: CompletionBody | ChatBody,
    rendered: ResponseAnswer | None = None,
) -> Response:
    """Returns the response to a request, in the form of `rendered` if that is given.

    An error before the first token becomes an HTTP error response.
    """
    if generation.has_schemas(body):
        await run_in_threadpool(generation.refuse_unsupported, body)
    else:
        generation.refuse_unsupported(body)
    await asyncio.sleep(0)  # validating a large body has just taken milliseconds
    own_answer, prompts = generation.begin_answer(body)
    answer: AnyAnswer = rendered or own_answer
    # The workers log the id of the answer, so it must be in the same line as the request's id.
    structlog.contextvars.bind_contextvars(generation=answer.id)
    model = await generation.find_model(caller.project_id, body.model)
    answer.model = model.model_id
    recording = None if rendered else recording_of(request, caller, body, own_answer)
    order = Order(
        answer.id,
        caller.key_id,
        model,
        prompts,
        body.num_choices,
        body.sampling(),
        is_streamed=bool(body.stream) and not answer.keeps_text,
    )
    request_router: RequestRouter = request.app.state.request_router
    meter = Meter(request.app.state.rate_limiter, request.app.state.usage_recorder, caller)
    request.state.rate_limit_headers = meter.headers
    try:
        work = begin(request_router, order, answer, recording, meter, is_streamed=bool(body.stream))
        return await unless_gone(request.receive, work)
    except ClientGone:
        return Response(status_code=CLIENT_CLOSED_REQUEST)


def recording_of(
    request: Request,
    caller: Principal,
    body: CompletionBody | ChatBody,
    answer: TextAnswer | ChatAnswer,
) -> Recording | None:
    """Returns a recording of the answer if it is to be stored. Only chats are ever stored."""
    if not isinstance(body, ChatBody) or not isinstance(answer, ChatAnswer):
        return None
    recorder: Recorder = request.app.state.recorder
    length = request.headers.get("content-length", "")
    num_bytes = int(length) if length.isdecimal() else 0
    return recorder.begin(caller, request.state.request_id, body, answer, request_bytes=num_bytes)


async def begin(
    request_router: RequestRouter,
    order: Order,
    answer: AnyAnswer,
    recording: Recording | None,
    meter: Meter,
    *,
    is_streamed: bool,
) -> Response:
    """Sends the prompts to workers and returns the response, after the first replies have arrived.

    A streamed response begins with these replies. Some streams begin without replies if the first
    one takes too long. Any other response waits for all replies.
    """
    reply_stream = await generation.begin(request_router, order, meter)
    try:
        if is_streamed:
            first = await take_within(reply_stream, answer.first_event_seconds)
            return EventStream(reply_stream, first, answer, recording)
        while replies := await reply_stream.take():
            answer.add(replies)
        parts = await generation.whole_json(answer)
        if recording is not None:
            recording.finish(parts)
        return JsonParts(parts)
    except BaseException:
        reply_stream.close()
        raise


async def take_within(reply_stream: ReplyStream, seconds: float | None) -> Replies | None:
    """Returns the next replies, or None if there are none within this time."""
    try:
        async with asyncio.timeout(seconds):
            return await reply_stream.take()
    except TimeoutError:
        return None


class JsonParts(Response):
    """JSON response that is written in pieces.

    A large response then neither blocks the event loop nor fills its buffers.
    """

    media_type = "application/json"

    def __init__(self, parts: list[bytes]) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"content-length": str(sum(map(len, parts)))})
        self._body_parts = parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        with suppress(ClientGone):
            await send_parts(send, self._pieces(), scope["path"])

    async def _pieces(self) -> AsyncIterator[bytes]:
        """Yields the body in pieces of about PIECE_BYTES bytes."""
        piece = bytearray()
        for part in self._body_parts:
            for begin in range(0, len(part), PIECE_BYTES):
                piece += part[begin : begin + PIECE_BYTES]
                if len(piece) >= PIECE_BYTES:
                    yield bytes(piece)
                    piece.clear()
                    await asyncio.sleep(0)
        if piece:
            yield bytes(piece)


async def send_parts(send: Send, parts: AsyncIterator[bytes], name: str) -> None:
    """Sends a response body. Raises ClientGone if the client reads nothing for too long."""
    try:
        async for part in parts:
            async with asyncio.timeout(SLOW_CLIENT_SECONDS):
                await send({"type": "http.response.body", "body": part, "more_body": True})
    except TimeoutError:
        log.info("slow_client_dropped", id=name)
        raise ClientGone from None
    await send({"type": "http.response.body", "body": b"", "more_body": False})


class EventStream(Response):
    """Response that streams an answer as server-sent events.

    The generation is cancelled when the client disconnects.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        reply_stream: ReplyStream,
        first: Replies | None,
        answer: AnyAnswer,
        recording: Recording | None,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._reply_stream = reply_stream
        self._first = first
        self._answer = answer
        self._recording = recording

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientGone):
                await unless_gone(receive, self._send_all(send))
        finally:
            self._reply_stream.close()

    async def _send_all(self, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        await send_parts(send, self._parts(), self._answer.id)

    async def _parts(self) -> AsyncIterator[bytes]:
        """Yields parts of the body; chunks that are available together form one part.

        An error after the first chunk is sent as the last event.
        """
        replies = self._first
        try:
            part = events(self._answer.opening())
            while replies is None or replies:
                if replies and self._recording is not None:
                    self._recording.add(replies)
                if replies and (part := part + events(self._answer.chunks(replies))):
                    yield part
                elif replies is None:
                    yield part + self._answer.ping()
                part = b""
                replies = await take_within(self._reply_stream, PING_SECONDS)
        except StillhouseError as error:
            yield part + events(self._answer.failure(error))
            return
        if self._recording is not None:
            self._recording.finish()
        for chunk in self._answer.closing():
            yield part + events([chunk])
            part = b""
        yield part + self._answer.ending


def events(chunks: list[dict[str, object]]) -> bytes:
    """Returns the chunks as server-sent events. A chunk with a type is an event of this type."""
    return b"".join(
        (b"event: %s\n" % str(chunk["type"]).encode() if "type" in chunk else b"")
        + b"data: "
        + orjson.dumps(chunk)
        + b"\n\n"
        for chunk in chunks
    )


async def unless_gone(receive: Receive, work: Coroutine[object, object, T]) -> T:
    """Returns the result of the work.

    If the client disconnects first, cancels the work and raises ClientGone.
    """
    job = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(hang_up(receive))
    try:
        await asyncio.wait({job, watch}, return_when=asyncio.FIRST_COMPLETED)
        if job.done():
            return job.result()
        raise ClientGone
    finally:
        for task in (job, watch):
            task.cancel()
        await asyncio.gather(job, watch, return_exceptions=True)


async def hang_up(receive: Receive) -> None:
    """Returns when the client has disconnected. Call it after the request body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
