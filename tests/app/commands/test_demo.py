"""The demo's progress as it is seen without a terminal."""

import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

FOLLOW = """
import sys, httpx
from rich.console import Console
from app.commands.demo import follow
with httpx.Client(base_url=sys.argv[1]) as client:
    follow(client, "job-1", Console(), line_seconds=0.0)
"""
IDLE = {"error": None, "latest_metrics": None}
JOB_STATES = [
    {"status": "queued", "stage": None, "progress": None, **IDLE},
    {
        "status": "running",
        "stage": "label_rows",
        "progress": {"percent": 12.4, "rows_done": 8, "rows_total": 64},
        **IDLE,
    },
    {"status": "succeeded", "stage": "label_rows", "progress": {"percent": 100}, **IDLE},
]


@pytest.fixture
def job_url() -> Iterator[str]:
    """URL of an API whose job is one state further with each request."""
    states = iter(JOB_STATES)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(next(states)).encode())

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class's name
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        serving = Thread(target=server.serve_forever)
        serving.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        serving.join()


def test_progress_is_printed_as_lines_without_a_terminal(job_url: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FOLLOW, job_url],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "  queued  0%" in done.stdout
    assert "  label rows  12%  8/64 answers" in done.stdout
