"""Spans of generation requests, with the attributes of OpenTelemetry's GenAI conventions.

The API process records a client span per request, and the serve worker a server span per prompt.
Prompts and answers are not recorded.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from app.contracts.generation import Delta, Done, GenerateRequest
from app.tracing.spans import (
    Attribute,
    Kind,
    end_span,
    is_tracing,
    start_span,
    traceparent_of,
)

if TYPE_CHECKING:
    from opentelemetry.trace import Span


class GenerationSpan:
    """Span of a request or of one prompt, from its start to its last reply."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self._began_at = time.monotonic()
        self._is_heard = False
        self._finish_reasons: list[str] = []
        self._num_prompt_tokens = self._num_cached_tokens = self._num_answer_tokens = 0

    @property
    def traceparent(self) -> str | None:
        return traceparent_of(self._span)

    def note(self, reply: Delta | Done) -> None:
        """Records the time of the first reply, finish reasons and the number of tokens."""
        if isinstance(reply, Done):
            self._num_prompt_tokens += reply.prompt_tokens
            self._num_cached_tokens += reply.cached_tokens
            self._num_answer_tokens += reply.completion_tokens
            return
        if not self._is_heard:
            self._is_heard = True
            seconds = time.monotonic() - self._began_at
            self._span.set_attribute("gen_ai.response.time_to_first_chunk", seconds)
        if reply.finish_reason is not None:
            self._finish_reasons.append(reply.finish_reason)

    def end(self, outcome: str, error: str | None = None) -> None:
        """Ends the span. `error` is the code of the error, if the request has failed."""
        attributes: dict[str, Attribute] = {
            "stillhouse.outcome": outcome,
            "gen_ai.response.finish_reasons": tuple(self._finish_reasons),
            "gen_ai.usage.input_tokens": self._num_prompt_tokens,
            "gen_ai.usage.output_tokens": self._num_answer_tokens,
            "gen_ai.usage.cache_read.input_tokens": self._num_cached_tokens,
        }
        end_span(self._span, attributes, error=error)


def start_generation(
    request: GenerateRequest, kind: Kind, *, parent: str | None = None
) -> GenerationSpan | None:
    """Returns the span of a request, or None if tracing is off or the request is no generation.

    The id of a request begins with that of the response, see `app.services.generation`.
    """
    if not is_tracing() or request.task != "generate":
        return None
    operation = "text_completion" if request.messages is None else "chat"
    sampling = request.sampling
    attributes: dict[str, Attribute] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "stillhouse",
        "gen_ai.request.model": request.model,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.choice.count": request.n,
        "gen_ai.response.id": request.id.rpartition("-")[0],
        "gen_ai.response.model": request.model,
    }
    if sampling.top_k:
        attributes["gen_ai.request.top_k"] = sampling.top_k
    if sampling.seed is not None:
        attributes["gen_ai.request.seed"] = sampling.seed
    if sampling.stop:
        attributes["gen_ai.request.stop_sequences"] = sampling.stop
    span = start_span(f"{operation} {request.model}", kind, attributes, parent=parent)
    return None if span is None else GenerationSpan(span)
