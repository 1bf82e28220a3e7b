"""`stillhouse usage`: the request that its options make, and its table, against a stub service."""

import json
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import typer

from app.commands.cli import main
from app.commands.remote.usage import time_of

Json = dict[str, Any]  # Any: JSON bodies of the API
BEGIN = 1_790_000_000


def bucket(number: int, results: list[Json]) -> Json:
    start = BEGIN + number * 3600
    return {"object": "bucket", "start_time": start, "end_time": start + 3600, "results": results}


def result(model: str, num_requests: int) -> Json:
    return {
        "object": "organization.usage.completions.result", "model": model, "project_id": None,
        "num_model_requests": num_requests, "input_tokens": 10 * num_requests,
        "output_tokens": 7 * num_requests, "input_cached_tokens": num_requests,
    }  # fmt: skip


PAGES: dict[str | None, Json] = {
    None: {
        "object": "page", "has_more": True, "next_page": "second",
        "data": [bucket(0, [result("a", 3), result("b", 1)]), bucket(1, [])],
    },
    "second": {
        "object": "page", "has_more": False, "next_page": None, "data": [bucket(2, [result("a", 2)])],
    },
}  # fmt: skip


class UsageServer(HTTPServer):
    """Service with OpenAI's report in two pages."""

    def __init__(self) -> None:
        self.queries: list[dict[str, list[str]]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                assert self.path.startswith("/v1/organization/usage/completions?")
                server.queries.append(parse_qs(urlsplit(self.path).query))
                body = json.dumps(PAGES[server.queries[-1].get("page", [None])[0]]).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class's name
                pass

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture
def report() -> Iterator[UsageServer]:
    with UsageServer() as server:
        serving = Thread(target=server.serve_forever)
        serving.start()
        yield server
        server.shutdown()
        serving.join()


@pytest.fixture
def run(report: UsageServer, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def do_run(*words: str) -> str:
        url = f"http://127.0.0.1:{report.server_port}"
        with pytest.raises(SystemExit) as ended:
            main(["usage", *words, "--url", url, "--key", "k"])
        assert not ended.value.code
        return capsys.readouterr().out

    return do_run


def test_all_pages_are_one_table(report: UsageServer, run: Callable[..., str]) -> None:
    shown = run(
        "--start", "2026-09-01T00:00+00:00", "--end", "2026-09-30T00:00+00:00", "--bucket", "1h",
        "--group-by", "model", "--group-by", "project_id", "--model", "a", "--project", "p",
    ).splitlines()  # fmt: skip
    assert shown[0].split() == [
        "BEGIN", "MODEL", "PROJECT_ID", "REQUESTS", "INPUT", "TOKENS", "CACHED", "TOKENS",
        "OUTPUT", "TOKENS",
    ]  # fmt: skip
    at = time.strftime("%Y-%m-%d %H:%M", time.localtime(BEGIN))
    assert shown[1].split() == [*at.split(), "a", "–", "3", "30", "3", "21"]
    assert [line.split()[-1] for line in shown[1:]] == ["21", "7", "14"]
    assert report.queries[0] == {
        "start_time": ["1788220800"], "end_time": ["1790726400"], "bucket_width": ["1h"],
        "group_by[]": ["model", "project_id"], "models[]": ["a"], "project_ids[]": ["p"],
    }  # fmt: skip
    assert report.queries[1] == {**report.queries[0], "page": ["second"]}


def test_json_is_one_document_or_one_entry_per_line(run: Callable[..., str]) -> None:
    document = json.loads(run("--json"))
    entries = [*PAGES[None]["data"], *PAGES["second"]["data"]]
    assert document == {"object": "page", "has_more": False, "next_page": None, "data": entries}
    assert [json.loads(line) for line in run("--json", "--all").splitlines()] == entries


def test_times_are_ages_or_dates() -> None:
    before = int(time.time())
    assert 0 <= time_of("36h") - (before - 36 * 3600) <= time.time() - before + 1
    assert time_of("2026-11-29T08:00+00:00") == 1_795_939_200
    for text in ("yesterday", "7", "-1d", ""):
        with pytest.raises(typer.BadParameter):
            time_of(text)
