"""Response bodies of /v1/completions and /v1/chat/completions, complete or as chunks of a stream.

Choices are numbered over all prompts: choice j of prompt i has the index i * n + j.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import orjson

from app.contracts.generation import Delta, Done, TokenLogprob, ToolCallDelta
from app.errors import StillhouseError, envelope
from app.schemas.chat.tools import NamedTool
from app.schemas.completions import ChatBody, CompletionBody, GenerationBody

Json = dict[str, object]
Replies = Iterable[tuple[int, Delta | Done]]


class JsonArray:
    """JSON array that is serialised as it grows, never all at once."""

    def __init__(self) -> None:
        self._items = bytearray()

    def extend(self, items: Sequence[object]) -> None:
        if items:
            self._items += b"," * bool(self._items) + orjson.dumps(items)[1:-1]

    def fragment(self) -> orjson.Fragment:
        return orjson.Fragment(b"[" + self._items + b"]")


@dataclass
class Choice:
    """Output of one choice so far.

    `num_characters` is the length of the tokens whose log-probabilities have been returned. It is
    the next `text_offset`. `tool_calls` holds the parts of the calls, in order.
    """

    text: list[str] = field(default_factory=list)
    logprobs: dict[str, JsonArray] = field(default_factory=dict)
    tool_calls: list[ToolCallDelta] = field(default_factory=list)
    finish_reason: str | None = None
    num_characters: int = 0


class Answer(ABC):
    """Answer to one client request, built from the replies of workers.

    Use `add` and `whole` for a complete response; `opening`, `chunks` and `closing` for a stream.

    keeps_text: A stream keeps the complete answer in memory.
    first_event_seconds: Time after which a stream begins without replies. None: it never does.
        Until then, an error has an HTTP status of its own.
    ending: Last bytes of a stream.
    """

    keeps_text = False
    first_event_seconds: float | None = None
    ending = b"data: [DONE]\n\n"

    def __init__(
        self, answer_id: str, body: GenerationBody, *, num_prompts: int, created: int
    ) -> None:
        self.id = answer_id
        self.model = body.model
        self._created = created
        self._num_choices = body.num_choices
        self._has_usage_chunk = (
            body.stream_options is not None and body.stream_options.include_usage
        )
        self._choices = [Choice() for _ in range(num_prompts * body.num_choices)]
        self._num_prompt_tokens = 0
        self._num_completion_tokens = 0
        self._num_cached_tokens = 0

    @property
    def num_tokens(self) -> tuple[int, int, int]:
        """Number of prompt tokens, of those in the prefix cache, and of generated tokens."""
        return self._num_prompt_tokens, self._num_cached_tokens, self._num_completion_tokens

    @property
    def created(self) -> int:
        """Time of the request, in seconds since the epoch."""
        return self._created

    def add(self, replies: Replies) -> None:
        """Collects replies for a complete response."""
        for prompt, reply in replies:
            if isinstance(reply, Done):
                self._count(reply)
                continue
            choice = self._choices[self._index(prompt, reply)]
            choice.text.append(reply.text)
            choice.tool_calls += reply.tool_calls
            choice.finish_reason = reply.finish_reason or choice.finish_reason
            for name, items in self._columns(choice, reply.logprobs or ()).items():
                choice.logprobs.setdefault(name, JsonArray()).extend(items)

    def whole(self) -> Iterator[bytes]:
        """Yields the JSON of the complete response in parts, about one per choice."""
        envelope = orjson.dumps(self._envelope(self._object(), []))
        yield envelope.removesuffix(b"]}")
        for index, choice in enumerate(self._choices):
            yield b"," * bool(index) + orjson.dumps(self._whole_choice(index, choice))
        yield b'],"usage":' + orjson.dumps(self._usage()) + b"}"

    def opening(self) -> list[Json]:
        """Returns the chunks that precede all text."""
        return []

    def chunks(self, replies: Replies) -> list[Json]:
        """Returns the replies as chunks. Does not keep their text."""
        made: list[Json] = []
        for prompt, reply in replies:
            if isinstance(reply, Done):
                self._count(reply)
            else:
                made += [
                    self._chunk([part]) for part in self._parts(self._index(prompt, reply), reply)
                ]
        return made

    def closing(self) -> list[Json]:
        """Returns the chunks that follow all text."""
        return [self._chunk([]) | {"usage": self._usage()}] if self._has_usage_chunk else []

    def failure(self, error: StillhouseError) -> list[Json]:
        """Returns the chunk that ends a stream after an error."""
        return [{**envelope(error)}]

    def ping(self) -> bytes:
        """Returns a comment that keeps the connection open.

        It has one newline. With two, the openai client would report an empty event.
        """
        return b": ping\n"

    @abstractmethod
    def _object(self, *, is_chunk: bool = False) -> str: ...

    @abstractmethod
    def _whole_choice(self, index: int, choice: Choice) -> Json: ...

    @abstractmethod
    def _columns(self, choice: Choice, logprobs: Sequence[TokenLogprob]) -> dict[str, list[object]]:
        """Returns the arrays of the `logprobs` object for these tokens of the choice."""

    @abstractmethod
    def _parts(self, index: int, delta: Delta) -> list[Json]:
        """Returns the entries of `choices` for a delta in a stream."""

    def _index(self, prompt: int, delta: Delta) -> int:
        return prompt * self._num_choices + delta.choice

    def _count(self, done: Done) -> None:
        self._num_prompt_tokens += done.prompt_tokens
        self._num_completion_tokens += done.completion_tokens
        self._num_cached_tokens += done.cached_tokens

    def _usage(self) -> Json:
        details = {"reasoning_tokens": 0, "audio_tokens": 0}
        details |= {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": self._num_completion_tokens,
            "total_tokens": self._num_prompt_tokens + self._num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self._num_cached_tokens, "audio_tokens": 0},
            "completion_tokens_details": details,
        }

    def _envelope(self, name: str, choices: Sequence[Json]) -> Json:
        return {
            "id": self.id,
            "object": name,
            "created": self._created,
            "model": self.model,
            "choices": choices,
        }

    def _chunk(self, choices: Sequence[Json]) -> Json:
        chunk = self._envelope(self._object(is_chunk=True), choices)
        return chunk | {"usage": None} if self._has_usage_chunk else chunk


class TextAnswer(Answer):
    """Answer of /v1/completions. Chunks and complete responses have the same format."""

    def __init__(self, answer_id: str, body: CompletionBody, *, created: int) -> None:
        super().__init__(answer_id, body, num_prompts=len(body.prompts), created=created)
        self._has_logprobs = body.logprobs is not None

    def _object(self, *, is_chunk: bool = False) -> str:
        return "text_completion"

    def _whole_choice(self, index: int, choice: Choice) -> Json:
        columns = {name: array.fragment() for name, array in choice.logprobs.items()}
        empty = self._columns(choice, ())
        return self._entry(index, "".join(choice.text), choice.finish_reason) | {
            "logprobs": empty | columns if self._has_logprobs else None
        }

    def _parts(self, index: int, delta: Delta) -> list[Json]:
        columns = self._columns(self._choices[index], delta.logprobs or ())
        return [self._entry(index, delta.text, delta.finish_reason) | {"logprobs": columns or None}]

    def _entry(self, index: int, text: str, finish_reason: str | None) -> Json:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}

    def _columns(self, choice: Choice, logprobs: Sequence[TokenLogprob]) -> dict[str, list[object]]:
        if not self._has_logprobs:
            return {}
        offsets: list[object] = []
        for entry in logprobs:
            offsets.append(choice.num_characters)
            choice.num_characters += len(entry.token)
        return {
            "tokens": [entry.token for entry in logprobs],
            "token_logprobs": [entry.logprob for entry in logprobs],
            "top_logprobs": [_best_of_text(entry) for entry in logprobs],
            "text_offset": offsets,
        }


class ChatAnswer(Answer):
    """Answer of /v1/chat/completions, a `chat.completion` or its chunks."""

    def __init__(self, answer_id: str, body: ChatBody, *, created: int) -> None:
        super().__init__(answer_id, body, num_prompts=1, created=created)
        self._has_logprobs = bool(body.logprobs)
        self._has_tools = bool(body.tools)
        self._is_call_named = isinstance(body.tool_choice, NamedTool)

    def _object(self, *, is_chunk: bool = False) -> str:
        return "chat.completion.chunk" if is_chunk else "chat.completion"

    def _whole_choice(self, index: int, choice: Choice) -> Json:
        text = "".join(choice.text)
        message: Json = {"role": "assistant", "content": text, "refusal": None}
        if calls := _whole_calls(choice.tool_calls):
            message |= {"content": text or None, "tool_calls": calls}
        content = choice.logprobs.get("content", JsonArray()).fragment()
        return {
            "index": index,
            "message": message,
            "logprobs": {"content": content, "refusal": None} if self._has_logprobs else None,
            "finish_reason": self._finish_reason(choice.finish_reason),
        }

    def _finish_reason(self, reason: str | None) -> str | None:
        """Returns the reason in the terms of OpenAI: "stop" if the client named the tool."""
        return "stop" if reason == "tool_calls" and self._is_call_named else reason

    def opening(self) -> list[Json]:
        # The openai client joins contents. An answer that has tool calls only keeps the null.
        content = None if self._has_tools else ""
        first: Json = {"role": "assistant", "content": content, "refusal": None}
        return [self._chunk([self._entry(index, first)]) for index in range(len(self._choices))]

    def _parts(self, index: int, delta: Delta) -> list[Json]:
        entries = []
        if delta.text or delta.logprobs:
            columns = self._columns(self._choices[index], delta.logprobs or ())
            logprobs: Json | None = {**columns, "refusal": None} if columns else None
            is_silent = self._has_tools and not delta.text
            content: Json = {} if is_silent else {"content": delta.text}
            entries.append(self._entry(index, content, logprobs))
        if delta.tool_calls:
            calls = [_streamed_call(part) for part in delta.tool_calls]
            entries.append(self._entry(index, {"tool_calls": calls}))
        if delta.finish_reason:
            reason = self._finish_reason(delta.finish_reason)
            entries.append(self._entry(index, {}) | {"finish_reason": reason})
        return entries

    def _entry(self, index: int, delta: Json, logprobs: Json | None = None) -> Json:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _columns(self, choice: Choice, logprobs: Sequence[TokenLogprob]) -> dict[str, list[object]]:
        if not self._has_logprobs:
            return {}
        content: list[object] = [
            _token(entry.token, entry.logprob, entry.bytes)
            | {
                "top_logprobs": [
                    _token(token, logprob, tuple(token.encode())) for token, logprob in entry.top
                ]
            }
            for entry in logprobs
        ]
        return {"content": content}


def _best_of_text(entry: TokenLogprob) -> dict[str, float] | None:
    """Returns the alternatives by their text, or None for the first token of a prompt.

    Tokens may have the same text. The highest log-probability is kept, so that a token is the best
    one if, and only if, its log-probability is the maximum.
    """
    if entry.logprob is None:
        return None
    best = {entry.token: entry.logprob}
    for text, logprob in entry.top:
        best[text] = max(logprob, best.get(text, logprob))
    return best


def _token(token: str, logprob: float | None, data: tuple[int, ...]) -> Json:
    return {"token": token, "logprob": logprob, "bytes": list(data)}


def _streamed_call(part: ToolCallDelta) -> Json:
    """Returns a part of a call. The openai client joins names and ids, so they are sent once."""
    if part.name is None:
        return {"index": part.index, "function": {"arguments": part.arguments}}
    function = {"name": part.name, "arguments": part.arguments}
    return {"index": part.index, "id": part.id, "type": "function", "function": function}


def _whole_calls(parts: Sequence[ToolCallDelta]) -> list[Json]:
    arguments: dict[int, list[str]] = {}
    for part in parts:
        arguments.setdefault(part.index, []).append(part.arguments)
    return [
        {
            "id": part.id,
            "type": "function",
            "function": {"name": part.name, "arguments": "".join(arguments[part.index])},
        }
        for part in parts
        if part.name is not None
    ]
