"""Answer of /v1/responses: a `response` object, or the typed events of a stream.

It is built from the replies to the same chat. An item is a message or a function call. The events
of an item are complete before the next item begins.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import orjson

from app.contracts.generation import Delta, Done, TokenLogprob, ToolCallDelta
from app.db.schema.ids import new_id
from app.errors import StillhouseError, envelope
from app.schemas.answers import Json, JsonArray
from app.schemas.responses.body import ResponseBody

Replies = Iterable[tuple[int, Delta | Done]]
FIRST_EVENT_SECONDS: Final = 60.0


@dataclass
class MessageOutput:
    """Message of the answer. Its only part is text."""

    index: int
    id: str = field(default_factory=lambda: new_id("msg_"))
    text: list[str] = field(default_factory=list)
    logprobs: JsonArray = field(default_factory=JsonArray)

    def part(self, *, has_logprobs: bool) -> Json:
        part: Json = {"type": "output_text", "text": "".join(self.text), "annotations": []}
        return part | {"logprobs": self.logprobs.fragment() if has_logprobs else []}

    def item(self, status: str, *, has_logprobs: bool) -> Json:
        is_empty = status == "in_progress"
        content = [] if is_empty else [self.part(has_logprobs=has_logprobs)]
        return {
            "id": self.id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }


@dataclass
class CallOutput:
    """Call of a function in the answer. `number` is its index among the calls."""

    index: int
    number: int
    call_id: str
    name: str
    id: str = field(default_factory=lambda: new_id("fc_"))
    arguments: list[str] = field(default_factory=list)

    def item(self, status: str, *, has_logprobs: bool = False) -> Json:
        return {
            "id": self.id,
            "type": "function_call",
            "status": status,
            "call_id": self.call_id,
            "name": self.name,
            "arguments": "".join(self.arguments),
        }


class ResponseAnswer:
    """Answer to one request, with the methods of `app.schemas.answers.Answer`."""

    keeps_text = True
    first_event_seconds: float | None = FIRST_EVENT_SECONDS
    ending = b""

    def __init__(self, body: ResponseBody, *, created: int) -> None:
        self.id = new_id("resp_")
        self.model = body.model
        self._body = body
        self._created = created
        self._output: list[MessageOutput | CallOutput] = []
        # Log-probabilities of tokens whose text, if they have any, has not arrived yet.
        self._waiting: list[Json] = []
        self._finish_reason: str | None = None
        self._usage: Json | None = None
        self._num_events = 0

    def add(self, replies: Replies) -> None:
        """Collects replies for a complete response."""
        for _ in self._events(replies):
            pass

    def whole(self) -> Iterator[bytes]:
        """Yields the JSON of the complete response."""
        self._end()
        yield orjson.dumps(self._response(self._status))

    def opening(self) -> list[Json]:
        """Returns the events that precede all items."""
        response = self._response("in_progress")
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
        ]

    def chunks(self, replies: Replies) -> list[Json]:
        """Returns the events of the replies."""
        return list(self._events(replies))

    def closing(self) -> list[Json]:
        """Returns the last events. The last one has the complete response."""
        events = self._end()
        status = self._status
        return [*events, self._event(f"response.{status}", response=self._response(status))]

    def failure(self, error: StillhouseError) -> list[Json]:
        """Returns the events that end a stream after an error.

        The last event has the flat form that the specification describes, and the nested form for
        which the openai client raises an error.
        """
        param = self._body.renamed_param(error.param)
        cause: Json = {"code": error.code, "message": error.message}
        failed = self._response("failed") | {"error": cause}
        nested = {**envelope(error)["error"], "param": param}
        return [
            self._event("response.failed", response=failed),
            self._event("error", **cause, param=param, error=nested),
        ]

    def ping(self) -> bytes:
        """Returns an event that keeps the connection open. Some clients ignore comments."""
        event = self._event("keepalive")
        return b"event: keepalive\ndata: " + orjson.dumps(event) + b"\n\n"

    @property
    def _status(self) -> str:
        return "incomplete" if self._finish_reason == "length" else "completed"

    @property
    def _last(self) -> MessageOutput | CallOutput | None:
        return self._output[-1] if self._output else None

    def _event(self, kind: str, **fields: object) -> Json:
        number, self._num_events = self._num_events, self._num_events + 1
        return {"type": kind, "sequence_number": number, **fields}

    def _events(self, replies: Replies) -> Iterator[Json]:
        for _, reply in replies:
            if isinstance(reply, Done):
                self._usage = _usage(reply)
                continue
            self._waiting += self._logprobs(reply.logprobs or ())
            if reply.text:
                yield from self._text(reply.text)
            for call in reply.tool_calls:
                self._waiting = []  # the tokens of calls have no place in a response
                yield from self._call(call)
            self._finish_reason = reply.finish_reason or self._finish_reason

    def _text(self, text: str) -> Iterator[Json]:
        message = self._last
        if not isinstance(message, MessageOutput):
            yield from self._done("completed")
            message = MessageOutput(len(self._output))
            yield from self._begin(message)
        yield self._add_text(message, text)

    def _add_text(self, message: MessageOutput, text: str) -> Json:
        """Adds text and the waiting log-probabilities to a message, and returns the event."""
        entries, self._waiting = self._waiting, []
        message.text.append(text)
        message.logprobs.extend(entries)
        return self._of_text(message, "output_text.delta", delta=text, logprobs=entries)

    def _call(self, delta: ToolCallDelta) -> Iterator[Json]:
        calls = (output for output in self._output if isinstance(output, CallOutput))
        call = next((call for call in calls if call.number == delta.index), None)
        if call is None:
            yield from self._done("completed")
            call_id = delta.id or new_id("call_")
            call = CallOutput(len(self._output), delta.index, call_id, delta.name or "")
            yield from self._begin(call)
        if delta.arguments:
            call.arguments.append(delta.arguments)
            yield self._of_item(call, "function_call_arguments.delta", delta=delta.arguments)

    def _begin(self, output: MessageOutput | CallOutput) -> Iterator[Json]:
        self._output.append(output)
        yield self._event(
            "response.output_item.added",
            output_index=output.index,
            item=output.item("in_progress", has_logprobs=False),
        )
        if isinstance(output, MessageOutput):
            part = output.part(has_logprobs=False)
            yield self._of_text(output, "content_part.added", part=part)

    def _done(self, status: str) -> Iterator[Json]:
        """Yields the events that end the last item, if there is one."""
        output, has_logprobs = self._last, self._body.has_logprobs
        if output is None:
            return
        if isinstance(output, MessageOutput):
            part = output.part(has_logprobs=has_logprobs)
            text, logprobs = part["text"], part["logprobs"]
            yield self._of_text(output, "output_text.done", text=text, logprobs=logprobs)
            yield self._of_text(output, "content_part.done", part=part)
        else:
            yield self._of_item(
                output,
                "function_call_arguments.done",
                name=output.name,
                arguments="".join(output.arguments),
            )
        item = output.item(status, has_logprobs=has_logprobs)
        yield self._event("response.output_item.done", output_index=output.index, item=item)

    def _end(self) -> list[Json]:
        """Ends the last item, and returns its events. An answer without items gets a message."""
        events = [] if self._output else list(self._begin(MessageOutput(0)))
        if self._waiting and isinstance(self._last, MessageOutput):
            events.append(self._add_text(self._last, ""))
        return events + list(self._done(self._status))

    def _of_item(self, output: MessageOutput | CallOutput, kind: str, **fields: object) -> Json:
        return self._event(
            f"response.{kind}", item_id=output.id, output_index=output.index, **fields
        )

    def _of_text(self, output: MessageOutput, kind: str, **fields: object) -> Json:
        return self._of_item(output, kind, content_index=0, **fields)

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> list[Json]:
        if not self._body.has_logprobs:
            return []
        return [
            _token(entry.token, entry.logprob, entry.bytes)
            | {"top_logprobs": [_token(t, value, tuple(t.encode())) for t, value in entry.top]}
            for entry in entries
        ]

    def _response(self, status: str) -> Json:
        body, is_cut = self._body, status == "incomplete"
        text: Json = {"format": {"type": "text"}}
        if body.text is not None and body.text.format is not None:
            text = {"format": body.text.format.model_dump(by_alias=True, exclude_none=True)}
        output: list[Json] = []
        if status in ("completed", "incomplete"):
            done = [item.item("completed", has_logprobs=True) for item in self._output[:-1]]
            last = [item.item(status, has_logprobs=True) for item in self._output[-1:]]
            output = done + last
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "model": self.model,
            "status": status,
            "output": output,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "usage": self._usage,
            "instructions": body.instructions,
            "metadata": body.metadata or {},
            "text": text,
            "tools": body.tools or [],
            "tool_choice": body.tool_choice or "auto",
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "top_logprobs": body.top_logprobs or 0,
            "max_output_tokens": body.max_output_tokens,
            "truncation": body.truncation or "disabled",
            "previous_response_id": None,
            "background": False,
            "store": False,
        }


def _token(token: str, logprob: float | None, data: tuple[int, ...]) -> Json:
    return {"token": token, "logprob": logprob, "bytes": list(data)}


def _usage(done: Done) -> Json:
    return {
        "input_tokens": done.prompt_tokens,
        "input_tokens_details": {"cached_tokens": done.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": done.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": done.prompt_tokens + done.completion_tokens,
    }
