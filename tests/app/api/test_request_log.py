"""The line that the API logs per request, if the setting asks for it."""

from collections.abc import Callable

import httpx
import openai
import pytest
import structlog

from app.settings import Settings

MERGE = structlog.contextvars.merge_contextvars


@pytest.fixture
def request_lines(settings_env: Callable[..., Settings]) -> None:
    settings_env(log_requests=True)


def test_each_request_is_one_line_with_its_ids(
    request_lines: None, client: openai.OpenAI, http: httpx.Client, register: Callable[..., str]
) -> None:
    register()
    with structlog.testing.capture_logs([MERGE]) as lines:
        answer = http.get("/v1/files/file-unknown")
        with pytest.raises(openai.InternalServerError):  # without a worker
            client.completions.create(model="tiny", prompt="x")
    got, generated = [line for line in lines if line["event"] == "request"]
    assert (got["method"], got["route"], got["status"]) == ("GET", "/v1/files/{file_id}", 404)
    assert got["request_id"] == answer.headers["x-request-id"]
    assert 0 <= got["first_byte_seconds"] <= got["seconds"]
    assert generated["status"] == 503
    assert generated["generation"].startswith("cmpl-")


def test_by_default_requests_are_not_logged(http: httpx.Client) -> None:
    with structlog.testing.capture_logs() as lines:
        http.get("/v1/files/file-unknown")
    assert [line for line in lines if line["event"] == "request"] == []
