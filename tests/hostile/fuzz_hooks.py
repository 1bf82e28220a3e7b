"""Loaded by schemathesis (tests/hostile/fuzz.py): half of the ids it invents become ids that exist, and errors are judged."""

import json
import os
import zlib
from typing import Any

import schemathesis

IDS: dict[str, list[str]] = json.loads(os.environ["FUZZ_IDS"])
Json = Any  # Any: whatever schemathesis makes up
ID_OR_NAME = ("/v1/models/import", "/v1/models/imports", "/v1/responses/input_tokens")


@schemathesis.hook
def map_path_parameters(context: Json, path_parameters: dict[str, Json]) -> dict[str, Json]:
    if context.operation.path.endswith(
        "/serving"
    ):  # nobody could generate with a model that goes to vLLM
        return path_parameters or {}
    return known_ids(path_parameters or {})


@schemathesis.hook
def map_body(context: Json, body: Json) -> Json:
    if not isinstance(body, dict):
        return body
    body = known_ids(body)
    method = body.get("method")
    if isinstance(method, dict) and isinstance(block := method.get("distillation"), dict):
        body["method"] = method | {"distillation": known_ids(block)}
    return body


def known_ids(values: dict[str, Json]) -> dict[str, Json]:
    return {name: known_id(name, value) for name, value in values.items()}


def known_id(name: str, value: Json) -> Json:
    """A string that could be an id, replaced half of the time: the same one always by the same."""
    if name not in IDS or not isinstance(value, str) or not 0 < len(value) <= 64 or "\0" in value:
        return value
    number = zlib.crc32(value.encode("utf-8", "surrogatepass"))
    return value if number % 2 else IDS[name][number // 2 % len(IDS[name])]


@schemathesis.check
def errors_come_in_the_envelope(context: Json, response: Json, case: Json) -> None:
    """Every error is OpenAI's, with a request id; one that passes says when to try again."""
    if response.status_code < 400 or case.method.upper() == "HEAD":
        return
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}, f"not the envelope: {error}"
    assert response.headers["x-request-id"]
    assert response.status_code not in (429, 503) or "retry-after" in response.headers


@schemathesis.hook
def filter_failure(context: Json, failure: Json, case: Json, response: Json) -> bool:
    """Returns False for responses that are right.

    - A header that no route declares: proxies add them.
    - GET and DELETE of /v1/models/import, /v1/models/imports and /v1/responses/input_tokens, whose
      last part is an id.
    - 503 for a model whose engine a case has set to vLLM, for which no worker runs here.
    """
    is_header = "in header - object with unexpected properties" in failure.message
    is_id = "Undocumented methods" in failure.message and case.path in ID_OR_NAME
    is_without_vllm = (
        response is not None
        and response.status_code == 503
        and response.json()["error"]["code"] == "no_worker"
        and "vLLM" in response.json()["error"]["message"]
    )
    return not (is_header or is_id or is_without_vllm)
