"""Rate limits over real HTTP, with two API processes on one Valkey.

No serve worker runs, so a request that is admitted ends with 503 `no_worker`.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import redis

from app.db.session import transaction
from app.db.usage.limits import Limits, set_key_limits, set_project_limits
from app.settings import Settings, get_settings
from tests.app.api.conftest import PROJECT, Service, running
from tests.waiting import wait_for

BODY: dict[str, Any] = {"model": "tiny", "prompt": "What is a lantern?", "max_tokens": 100}


@pytest.fixture
def model(service: Service, request: Any) -> str:
    name: str = request.getfixturevalue("register")()
    return name


@pytest.fixture
def second_service(service: Service) -> Iterator[Service]:
    """Another API process with the same Postgres and Valkey."""
    settings: Settings = get_settings()
    with running(settings) as made:
        yield made


def ask(service: Service, key: str, **changes: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(
        f"{service.url}/v1/completions", json=BODY | changes, headers=headers, timeout=20
    )


def is_admitted(answer: httpx.Response) -> bool:
    if answer.status_code == 429:
        return False
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_worker"), answer.text
    return True


def test_two_processes_together_admit_what_the_limit_allows_and_no_more(
    model: str, service: Service, second_service: Service
) -> None:
    limit, num_requests = 5, 40
    key = service.new_key(limits=Limits(requests_per_minute=limit))

    async def ask_all() -> Counter[tuple[str, bool]]:
        headers = {"authorization": f"Bearer {key}"}
        counts: Counter[tuple[str, bool]] = Counter()
        async with httpx.AsyncClient(headers=headers, timeout=30) as http:

            async def ask_one(url: str) -> None:
                answer = await http.post(f"{url}/v1/completions", json=BODY)
                counts[url, is_admitted(answer)] += 1

            urls = [service.url, second_service.url] * (num_requests // 2)
            await asyncio.gather(*map(ask_one, urls))
        return counts

    began = time.monotonic()
    counts = asyncio.run(ask_all())
    num_admitted = counts[service.url, True] + counts[second_service.url, True]
    # One more comes back after 12 s.
    assert limit <= num_admitted <= limit + (time.monotonic() - began) * limit / 60
    assert sum(counts.values()) == num_requests


def test_a_refusal_says_in_openais_form_when_to_try_again(model: str, service: Service) -> None:
    key = service.new_key(limits=Limits(requests_per_minute=2, tokens_per_minute=500))
    first = ask(service, key)
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-limit-tokens"] == "500"
    # 18 bytes of prompt are 7 tokens by the estimate.
    assert first.headers["x-ratelimit-remaining-tokens"] == str(500 - 7 - 100)
    assert first.headers["x-ratelimit-reset-requests"] == "30s"
    ask(service, key)
    with service.client(key) as client, pytest.raises(openai.RateLimitError) as refused:
        client.completions.create(**BODY)
    error, headers = refused.value, refused.value.response.headers
    assert (error.code, error.type) == ("rate_limit_exceeded", "rate_limit_error")
    key_id = key.split("-")[2]
    said = f"Rate limit reached for API key {key_id} on requests per minute (RPM): Limit 2, Used 2, Requested 1."
    assert said in error.message
    assert "Please try again in " in error.message
    assert 0 < int(headers["retry-after-ms"]) <= 30_000
    assert 1 <= int(headers["retry-after"]) <= 30
    assert headers["x-ratelimit-remaining-requests"] == "0"


def test_tokens_of_a_request_that_fails_come_back(
    model: str, service: Service, valkey: str
) -> None:
    key = service.new_key(limits=Limits(tokens_per_minute=200))
    with redis.Redis.from_url(valkey) as client:
        for _ in range(3):  # each takes 107 of 200 tokens for as long as it lasts
            assert is_admitted(ask(service, key))
            wait_for(lambda: not client.keys("stillhouse:limit:*"), 5, "they did not come back")


def test_a_request_beyond_the_limit_itself_is_not_worth_a_retry(
    model: str, service: Service
) -> None:
    key = service.new_key(limits=Limits(tokens_per_minute=200))
    with service.client(key) as client, pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**BODY | {"n": 2})
    assert (refused.value.code, refused.value.param) == ("request_too_large", "max_tokens")
    assert "limited to 200 tokens per minute" in refused.value.message
    assert is_admitted(ask(service, key))


def test_keys_share_the_limit_of_their_project_and_a_changed_limit_holds_at_once(
    model: str, service: Service
) -> None:
    keys = [service.new_key(), service.new_key()]
    stranger = service.new_key("rival")
    with transaction() as session:
        set_project_limits(session, PROJECT, {"requests_per_minute": 2})
    assert all(is_admitted(ask(service, key)) for key in keys)
    refused = [ask(service, key) for key in keys]
    assert [is_admitted(answer) for answer in refused] == [False, False]
    assert f"project {PROJECT}" in refused[0].json()["error"]["message"]
    assert ask(service, stranger).status_code == 404  # it has no such model, and no limit
    with transaction() as session:
        set_project_limits(session, PROJECT, {"requests_per_minute": None})
    assert is_admitted(ask(service, keys[0]))
    with transaction() as session:
        set_key_limits(session, keys[0].split("-")[2], {"tokens_per_minute": 50})
    assert ask(service, keys[0]).status_code == 400


def test_a_key_without_limits_has_no_headers_and_costs_valkey_nothing(
    model: str, service: Service, valkey: str
) -> None:
    with redis.Redis.from_url(valkey) as client:
        client.config_resetstat()
        answer = ask(service, service.new_key())
        assert is_admitted(answer)
        assert [name for name in answer.headers if name.startswith("x-ratelimit")] == []
        assert "cmdstat_evalsha" not in client.info("commandstats")
        ask(service, service.new_key(limits=Limits(requests_per_minute=1)))
        assert "cmdstat_evalsha" in client.info("commandstats")
