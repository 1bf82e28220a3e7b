"""Commands that wait for a slow or a silent service, against a stub of it."""

import json
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import httpx
import pytest

from app.commands import remote_service
from app.commands.cli import main
from app.commands.progress_lines import ProgressLines
from app.commands.remote import registry

Json = dict[str, Any]  # Any: JSON bodies of the API
MODEL_STATUS: Json = {"model": "m", "state": "loading", "is_pinned": False}
WORKER: Json = {"worker": "w", "state": "loading", "percent": 5.0, "weights": None, "bytes": None}
WORKER |= {"load_seconds": None, "first_token_ms": None, "error": None}


class Stub(ThreadingHTTPServer):
    """Service whose responses are those of `answers`, by method and path, in their order.

    The last response of a path is repeated.
    """

    def __init__(self) -> None:
        self.answers: dict[str, list[bytes]] = {}
        self.requests: list[str] = []
        self.delay_seconds = 0.0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("content-length", 0)))
                server.requests.append(f"{self.command} {self.path}")
                time.sleep(server.delay_seconds)
                answers = server.answers[f"{self.command} {self.path.partition('?')[0]}"]
                self.send_response(200)
                self.end_headers()
                self.wfile.write(answers.pop(0) if len(answers) > 1 else answers[0])

            do_POST = do_GET  # the base class's name

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # as above
                pass

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture
def stub() -> Iterator[Stub]:
    with Stub() as server:
        serving = Thread(target=server.serve_forever)
        serving.start()
        yield server
        server.shutdown()
        serving.join()


@pytest.fixture
def run(stub: Stub, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """A function that returns the exit status, the output, and the messages of a command."""

    def do_run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([*words, "--url", f"http://127.0.0.1:{stub.server_port}", "--key", "k"])
        out, err = capsys.readouterr()
        code = ended.value.code
        return (1, out, err + code) if isinstance(code, str) else (int(code or 0), out, err)

    return do_run


def document(body: Json) -> bytes:
    return json.dumps(body).encode()


def event(number: int) -> bytes:
    body = {"id": f"e{number}", "created_at": 0, "level": "info", "message": f"event {number}"}
    return b"data: " + document(body) + b"\n\n"


def test_a_model_is_not_awaited_for_ever_without_a_serve_worker(
    stub: Stub, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "WORKER_SECONDS", 0.5)
    stub.answers["POST /v1/models/m/load"] = [document({**MODEL_STATUS, "workers": [WORKER]})]
    gone = document({**MODEL_STATUS, "state": "absent", "workers": []})
    stub.answers["GET /v1/models/m/status"] = [gone]
    status, out, err = run("models", "serve", "m")
    assert (status, out) == (1, "")
    assert "no serve worker has been running" in err


def test_json_of_a_loaded_model_is_all_of_standard_output(
    stub: Stub, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ProgressLines.__init__, "__defaults__", (0.0,))
    loaded = {**MODEL_STATUS, "state": "resident", "workers": [{**WORKER, "state": "resident"}]}
    stub.answers["POST /v1/models/m/load"] = [document({**MODEL_STATUS, "workers": [WORKER]})]
    stub.answers["GET /v1/models/m/status"] = [document(loaded)]
    status, out, err = run("models", "serve", "m", "--json")
    assert (status, json.loads(out)) == (0, loaded)
    assert "loading m  5%" in err


def test_events_are_followed_over_lost_connections_however_long_there_is_none(
    stub: Stub, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_service, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr("app.commands.remote.job_events.WAIT_SECONDS", 0.01)
    path = "GET /v1/fine_tuning/jobs/j"
    stub.answers[path] = [document({"status": "running"})]
    stub.answers[f"{path}/events"] = [event(1), b": ping\n", b"", event(2) + b"data: [DONE]\n\n"]
    status, out, _ = run("jobs", "events", "j", "--follow")
    assert (status, [line.split()[-1] for line in out.splitlines()]) == (0, ["1", "2"])
    assert [line for line in stub.requests if "events" in line][1:] == 3 * [
        f"{path}/events?stream=true&after=e1"
    ]


def test_following_ends_if_the_events_of_an_ended_job_cannot_be_read(
    stub: Stub, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.commands.remote.job_events.WAIT_SECONDS", 0.01)
    stub.answers["GET /v1/fine_tuning/jobs/j"] = [document({"status": "succeeded"})]
    stub.answers["GET /v1/fine_tuning/jobs/j/events"] = [b""]
    status, _, err = run("jobs", "events", "j", "--follow")
    assert (status, "ended early" in err) == (1, True)


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_json_of_a_long_answer_is_awaited_as_long_as_a_stream(
    stub: Stub,
    run: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    monkeypatch.setattr(remote_service, "TIMEOUT", httpx.Timeout(0.2))
    stub.delay_seconds = 0.6
    for path in ("/v1/completions", "/v1/chat/completions"):
        stub.answers[f"POST {path}"] = [document({"choices": []})]
    status, out, err = run(command, "m", "Hello", "--json")
    assert (status, json.loads(out)) == (0, {"choices": []}), err
