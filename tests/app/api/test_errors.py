import http.client
import json
from collections.abc import Callable
from urllib.parse import urlsplit

import httpx
import openai
import psycopg
import pytest

from app.api.errors import error_response
from app.errors import TimedOut
from app.settings import Settings

ENVELOPE = {"message", "type", "param", "code"}


def error(answer: httpx.Response) -> dict[str, str | None]:
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == ENVELOPE
    assert answer.headers["x-request-id"].startswith("req_")
    found: dict[str, str | None] = body["error"]
    return found


def test_an_unknown_url_is_an_envelope(http: httpx.Client) -> None:
    answer = http.get("/v1/nothing")
    assert answer.status_code == 404
    assert error(answer)["code"] == "unknown_url"


def test_a_wrong_method_is_an_envelope_that_says_what_is_allowed(http: httpx.Client) -> None:
    answer = http.put("/v1/files")
    assert (answer.status_code, error(answer)["code"]) == (405, "method_not_allowed")


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/files", "GET, POST"),
        ("/v1/files/file-1", "GET, DELETE"),
        ("/v1/responses/input_tokens", "POST"),  # and not those of /v1/responses/{response_id}
        ("/v1/models/m/files/a/b", "GET, HEAD"),
        ("/openapi.json", "GET, HEAD"),
    ],
)
def test_the_allowed_methods_are_those_of_the_routes_with_the_path(
    http: httpx.Client, path: str, allowed: str
) -> None:
    assert http.patch(path).headers["allow"] == allowed


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"{", "invalid_json"),
        (b'{"model": NaN}', "invalid_json"),
        (b'{"model": "\\ud800"}', "invalid_json"),
        (b"[" * 50_000, "invalid_json"),
        (b"", "missing_required_parameter"),
        (b"[1]", "invalid_value"),
        (b'"text"', "invalid_value"),
    ],
)
def test_a_body_that_is_no_json_object_is_an_envelope(
    http: httpx.Client, content: bytes, code: str
) -> None:
    answer = http.post(
        "/v1/fine_tuning/jobs", content=content, headers={"content-type": "application/json"}
    )
    assert (answer.status_code, error(answer)["code"]) == (400, code)


def test_a_wrong_query_parameter_is_named(http: httpx.Client) -> None:
    answer = http.get("/v1/fine_tuning/jobs", params={"limit": 101})
    assert answer.status_code == 400
    assert error(answer)["param"] == "limit"


@pytest.mark.parametrize(
    "url", ["/v1/files/a%00b", "/v1/files?after=a%00b", "/v1/models/%FF%FE", "/v1/files/..%2f.."]
)
def test_strange_urls_are_refused_quietly(http: httpx.Client, url: str) -> None:
    answer = http.get(url)
    assert answer.status_code in (400, 404)
    error(answer)


def test_a_body_over_the_cap_is_refused(http: httpx.Client) -> None:
    answer = http.post("/v1/fine_tuning/jobs", content=b"x" * 100_001)
    assert (answer.status_code, error(answer)["code"]) == (413, "body_too_large")


def test_a_body_without_a_length_is_cut_off_at_the_cap(http: httpx.Client) -> None:
    answer = http.post("/v1/fine_tuning/jobs", content=(b"x" * 10_000 for _ in range(20)))
    assert (answer.status_code, error(answer)["code"]) == (413, "body_too_large")


def test_every_answer_tells_its_request_and_its_time(client: openai.OpenAI) -> None:
    answer = client.files.with_raw_response.list()
    assert answer.headers["openai-processing-ms"].isdigit()
    assert answer.headers["x-request-id"] == answer.parse()._request_id


def test_a_page_of_another_origin_may_ask_with_its_key(http: httpx.Client) -> None:
    """As the OpenAI client does in a browser: asked for leave first, with headers of its own."""
    asked = {
        "origin": "https://app.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,x-stainless-lang",
    }
    leave = http.options("/v1/chat/completions", headers=asked)
    assert leave.status_code == 200
    assert leave.headers["access-control-allow-origin"] == "*"
    assert "x-stainless-lang" in leave.headers["access-control-allow-headers"]
    for key in (http.headers["authorization"], "Bearer wrong"):
        answer = http.get(
            "/v1/files", headers={"origin": "https://app.example", "authorization": key}
        )
        assert answer.headers["access-control-allow-origin"] == "*"
        assert answer.headers["access-control-expose-headers"] == "*"
    assert "access-control-allow-credentials" not in leave.headers


def test_a_request_that_took_all_its_time_is_not_to_be_tried_again() -> None:
    assert error_response(TimedOut("too late")).headers["x-should-retry"] == "false"


def test_a_fault_of_ours_is_opaque_and_quotes_the_request(
    http: httpx.Client, database: str
) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("ALTER TABLE files RENAME TO hidden")
    answer = http.get("/v1/files")
    assert answer.status_code == 500
    found = error(answer)
    assert found["code"] == "internal_error"
    assert answer.headers["x-request-id"] in str(found["message"])
    assert "files" not in str(found["message"])


def test_a_database_that_is_away_is_503_with_retry_after(
    http: httpx.Client, database: str, settings_env: Callable[..., Settings]
) -> None:
    settings_env(database_url="postgresql://nobody@127.0.0.1:1/none")
    answer = http.get("/v1/files")
    assert (answer.status_code, error(answer)["code"]) == (503, "database_unavailable")
    assert int(answer.headers["retry-after"]) <= 120
    assert http.get("/health/ready").status_code == 503
    assert http.get("/health/live").status_code == 200
    settings_env(database_url=database)


def test_a_client_that_leaves_in_the_middle_of_its_body_harms_nobody(http: httpx.Client) -> None:
    address = urlsplit(str(http.base_url))
    connection = http_connection(address.hostname or "", address.port or 0)
    connection.putrequest("POST", "/v1/files")
    connection.putheader("authorization", http.headers["authorization"])
    connection.putheader("content-type", "multipart/form-data; boundary=x")
    connection.putheader("content-length", "1000")
    connection.endheaders(
        b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\nabc'
    )
    connection.close()
    assert http.get("/v1/files").json()["data"] == []


def http_connection(host: str, port: int) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(host, port, timeout=10)


def test_the_api_describes_itself(http: httpx.Client) -> None:
    described = http.get("/openapi.json").json()
    assert "/v1/fine_tuning/jobs/{job_id}/events" in described["paths"]
    assert json.dumps(described)
