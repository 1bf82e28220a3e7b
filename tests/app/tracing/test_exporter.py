"""The exporter of spans, with a collector that never answers."""

import socket
import threading

from app.tracing.exporter import SpanExporter


def test_closing_does_not_wait_for_a_collector_that_never_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        exporter = SpanExporter(f"http://127.0.0.1:{silent.getsockname()[1]}", "test")
        exporter.start("job", "internal", {}, None).end()
        exporter.close()
        # The thread of the SDK still waits, for longer than this test.
        assert "otel-close" in {thread.name for thread in threading.enumerate()}
