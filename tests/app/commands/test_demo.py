"""The demo's progress as it is seen without a terminal."""

import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import IO

import pytest

FOLLOW = """
import sys, httpx
from rich.console import Console
from app.commands.demo import follow
with httpx.Client(base_url=sys.argv[1]) as client:
    follow(client, "job-1", Console(), line_seconds=float(sys.argv[2]))
"""
IDLE = {"error": None, "latest_metrics": None}
LABELLING = {"rows_done": 8, "rows_total": 64}
JOB_STATES = [
    {"status": "queued", "stage": None, "progress": None, **IDLE},
    {
        "status": "running",
        "stage": "generating_teacher_data",
        "progress": {"percent": 12, **LABELLING},
        **IDLE,
    },
    {
        "status": "running",
        "stage": "generating_teacher_data",
        "progress": {"percent": 29, **LABELLING},
        **IDLE,
    },
    {
        "status": "succeeded",
        "stage": "generating_teacher_data",
        "progress": {"percent": 100},
        **IDLE,
    },
]
LINES = [
    "  queued  0%",
    "  generating teacher data  12%  8/64 answers",
    "  generating teacher data  29%  8/64 answers",
    "  succeeded  100%",
]


class JobServer:
    """API of one job that keeps its state until the test sets another."""

    def __init__(self) -> None:
        self.state = JOB_STATES[0]
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(api.state).encode())

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class's name
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def api() -> Iterator[JobServer]:
    running = JobServer()
    yield running
    running.close()


def line_with(words: str, output: IO[str]) -> str:
    """Reads lines until one has the words."""
    for line in output:
        if words in line:
            return line
    raise AssertionError(f"the output ended without {words!r}")


@pytest.mark.parametrize(
    ("line_seconds", "num_states"), [("3600", (0, 1, 3)), ("0", (0, 1, 2, 3))],
    ids=["at each stage", "again and again"],
)  # fmt: skip
def test_progress_is_printed_as_lines_without_a_terminal(
    api: JobServer, line_seconds: str, num_states: tuple[int, ...]
) -> None:
    """The job goes on only when the line of its state has arrived, so no line is held back."""
    process = subprocess.Popen(
        [sys.executable, "-c", FOLLOW, api.url, line_seconds], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout as output:
        for number in num_states:
            api.state = JOB_STATES[number]
            line_with(LINES[number], output)
        output.read()  # a closed pipe would end the process
    assert process.wait(60) == 0
