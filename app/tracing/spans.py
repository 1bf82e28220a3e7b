"""Spans of this process. Without an endpoint nothing is imported, recorded or sent.

A span is None if tracing is off, and all functions accept that. Contexts travel between processes
as the `traceparent` of W3C Trace Context.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from app.settings import Settings

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from app.tracing.exporter import SpanExporter

Kind = Literal["internal", "server", "client", "consumer"]
Attribute = str | int | float | bool | tuple[str, ...]

_exporter: SpanExporter | None = None


def start_tracing(settings: Settings, role: str) -> None:
    """Starts to send spans if the settings name an endpoint. Ends what an earlier call started.

    Raises RuntimeError if OpenTelemetry is not installed.
    """
    global _exporter
    stop_tracing()
    if not settings.otlp_endpoint:
        return
    try:
        from app.tracing.exporter import SpanExporter
    except ImportError as error:
        raise RuntimeError(
            'traces need OpenTelemetry: pip install "stillhouse[otel]", or unset STILLHOUSE_OTLP_ENDPOINT'
        ) from error
    _exporter = SpanExporter(settings.otlp_endpoint, f"stillhouse-{role}")


def stop_tracing() -> None:
    """Sends the spans that have ended, and records no more."""
    global _exporter
    ending, _exporter = _exporter, None
    if ending is not None:
        ending.close()


def is_tracing() -> bool:
    """Returns whether this process records spans."""
    return _exporter is not None


def start_span(
    name: str,
    kind: Kind,
    attributes: Mapping[str, Attribute],
    *,
    parent: str | None = None,
) -> Span | None:
    """Returns a new span, or None if tracing is off. `end_span` ends it.

    parent: A `traceparent`. None means the current span. A malformed one means no parent.
    """
    if _exporter is None:
        return None
    return _exporter.start(name, kind, attributes, parent)


def end_span(
    span: Span | None,
    attributes: Mapping[str, Attribute] | None = None,
    *,
    error: str | None = None,
) -> None:
    """Ends a span. `error` is the type of the error, if the operation has failed."""
    if span is None:
        return
    if attributes:
        span.set_attributes(attributes)
    if error is not None:
        from opentelemetry.trace import StatusCode

        span.set_attribute("error.type", error)
        span.set_status(StatusCode.ERROR)
    span.end()


@contextmanager
def current_span(span: Span | None) -> Iterator[None]:
    """Makes the span the parent of the spans that start within the block, and ends it after it."""
    if span is None:
        yield
        return
    from opentelemetry.trace import use_span

    with use_span(span, end_on_exit=True):
        yield


def traceparent_of(span: Span | None) -> str | None:
    """Returns the `traceparent` of a span, or None without a span."""
    if span is None:
        return None
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def current_traceparent() -> str | None:
    """Returns the `traceparent` of the current span, or None if tracing is off."""
    if _exporter is None:
        return None
    from opentelemetry.trace import get_current_span

    span = get_current_span()
    return traceparent_of(span) if span.get_span_context().is_valid else None
