"""Records spans with the OpenTelemetry SDK and sends them by OTLP over HTTP.

This module is imported only if tracing is on. The SDK reads further options from the standard
`OTEL_*` variables, such as the sampler and the headers of the exporter.
"""

import threading
from collections.abc import Mapping
from typing import Final

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

CLOSE_SECONDS: Final = 3.0  # longest wait at shutdown for the collector
KINDS = {
    "internal": SpanKind.INTERNAL,
    "server": SpanKind.SERVER,
    "client": SpanKind.CLIENT,
    "consumer": SpanKind.CONSUMER,
}


class SpanExporter:
    """Tracer of this process, with a thread that sends ended spans in batches.

    The provider is not made the global one, so that libraries do not send spans of their own.
    """

    def __init__(self, endpoint: str, service_name: str) -> None:
        resource = Resource.create({"service.name": service_name})
        self._provider = TracerProvider(resource=resource)
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("stillhouse")
        self._propagator = TraceContextTextMapPropagator()

    def start(
        self,
        name: str,
        kind: str,
        attributes: Mapping[str, str | int | float | bool | tuple[str, ...]],
        parent: str | None,
    ) -> Span:
        """Returns a new span. Without `parent`, its parent is the current span."""
        context = self._propagator.extract({"traceparent": parent}) if parent else None
        return self._tracer.start_span(name, context, KINDS[kind], attributes)

    def close(self) -> None:
        """Sends the remaining spans. Waits for 3 seconds at most; the rest is then lost."""
        # The SDK itself waits for up to 30 s, so its daemon thread is abandoned after this time.
        closing = threading.Thread(target=self._provider.shutdown, name="otel-close", daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)
