"""Each limit of the settings, met over HTTP: the right code in OpenAI's envelope, and `Retry-After` where waiting helps."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from app.settings import Settings
from tests.app.api.conftest import Service

Set = Callable[..., Settings]
Json = dict[str, Any]  # Any: JSON
ROW = json.dumps({"prompt": "Ask", "completion": "Answer."})


def upload(http: httpx.Client, content: bytes, purpose: str = "fine-tune") -> httpx.Response:
    return http.post(
        "/v1/files", files={"file": ("rows.jsonl", content)}, data={"purpose": purpose}
    )


def rows(num_rows: int) -> bytes:
    return f"{ROW}\n".encode() * num_rows


def expect(answer: httpx.Response, status: int, code: str, *, is_temporary: bool = False) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == code
    assert error["message"]
    assert ("retry-after" in answer.headers) == is_temporary


def test_a_body_over_the_limit_is_refused_before_and_after_it_is_sent(http: httpx.Client) -> None:
    big = json.dumps({"model": "tiny", "prompt": "a" * 200_000}).encode()
    expect(http.post("/v1/completions", content=big), 413, "body_too_large")
    # in chunks, no length
    expect(http.post("/v1/completions", content=iter([big])), 413, "body_too_large")


def test_a_file_over_the_limit_is_refused(http: httpx.Client) -> None:
    expect(upload(http, rows(12_000)), 413, "file_too_large")


def test_a_file_of_too_many_rows_is_refused(http: httpx.Client, settings_env: Set) -> None:
    settings_env(max_rows_per_file=3)
    assert upload(http, rows(3)).status_code == 200
    expect(upload(http, rows(4)), 400, "invalid_file")


def test_a_line_over_the_limit_is_refused(http: httpx.Client, settings_env: Set) -> None:
    settings_env(max_line_bytes=100)
    expect(upload(http, b'{"text": "' + b"a" * 200 + b'"}'), 400, "invalid_file")


def test_a_project_keeps_so_many_files(http: httpx.Client, settings_env: Set) -> None:
    settings_env(max_files_per_project=1)
    kept = upload(http, rows(1)).json()["id"]
    expect(upload(http, rows(1)), 429, "insufficient_quota", is_temporary=True)
    http.delete(f"/v1/files/{kept}")
    assert upload(http, rows(1)).status_code == 200


def test_a_project_keeps_so_many_bytes(
    service: Service, http: httpx.Client, settings_env: Set
) -> None:
    settings_env(max_bytes_per_project=3 * len(rows(1)))
    assert upload(http, rows(2)).status_code == 200
    expect(upload(http, rows(2)), 429, "insufficient_quota", is_temporary=True)
    assert upload(http, rows(1)).status_code == 200
    with service.http(service.new_key("rival")) as stranger:
        assert upload(stranger, rows(2)).status_code == 200


def test_uploads_side_by_side_do_not_pass_the_quota(http: httpx.Client, settings_env: Set) -> None:
    settings_env(max_files_per_project=3)
    with ThreadPoolExecutor(12) as threads:
        codes = [
            answer.status_code for answer in threads.map(lambda _: upload(http, rows(1)), range(12))
        ]
    assert sorted(codes) == [200] * 3 + [429] * 9


@pytest.fixture
def job_body(http: httpx.Client, register: Callable[..., str]) -> Json:
    register()
    method = {
        "type": "distillation",
        "distillation": {"teacher": "tiny", "student": {"num_layers": 2}},
    }
    return {"model": "tiny", "training_file": upload(http, rows(4)).json()["id"], "method": method}


def test_a_project_has_so_many_jobs_side_by_side_too(
    http: httpx.Client, settings_env: Set, job_body: Json
) -> None:
    settings_env(max_active_jobs_per_project=2)
    with ThreadPoolExecutor(8) as threads:
        answers = list(
            threads.map(lambda _: http.post("/v1/fine_tuning/jobs", json=job_body), range(8))
        )
    assert sorted(answer.status_code for answer in answers) == [200] * 2 + [429] * 6
    expect(
        next(answer for answer in answers if answer.status_code == 429),
        429,
        "insufficient_quota",
        is_temporary=True,
    )


def test_a_project_has_so_many_batches(
    http: httpx.Client, settings_env: Set, job_body: Json
) -> None:
    settings_env(max_active_jobs_per_project=1)
    line = {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "tiny", "prompt": "a"},
    }
    asked = upload(http, json.dumps(line).encode(), purpose="batch").json()["id"]
    body = {"input_file_id": asked, "endpoint": "/v1/completions", "completion_window": "24h"}
    assert http.post("/v1/batches", json=body).status_code == 200
    expect(http.post("/v1/batches", json=body), 429, "insufficient_quota", is_temporary=True)


def test_a_key_has_so_many_generations(
    http: httpx.Client, settings_env: Set, job_body: Json
) -> None:
    most = settings_env().max_requests_per_key
    body = {"model": "tiny", "prompt": ["a"] * (most + 1), "max_tokens": 1}
    expect(http.post("/v1/completions", json=body), 400, "request_too_large")


def test_without_a_worker_generation_says_when_to_come_back(
    http: httpx.Client, job_body: Json
) -> None:
    answer = http.post("/v1/completions", json={"model": "tiny", "prompt": "a"})
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0


def test_a_full_disk_refuses_uploads_for_now(http: httpx.Client, settings_env: Set) -> None:
    settings_env(min_free_bytes=2**60)
    expect(upload(http, rows(1)), 503, "insufficient_storage", is_temporary=True)
