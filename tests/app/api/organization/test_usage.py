"""Usage of a real serve worker over real HTTP: the report is the sum of what the answers said."""

import json
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import httpx
import openai
import pytest
import redis

from app.db.session import transaction
from app.db.usage.limits import Limits
from app.db.usage.records import UsageCounts, UsageKey, add_usage, this_minute
from app.services.limits.rate_limiter import UNIT
from app.settings import get_settings
from tests.app.api.conftest import PROJECT, Service, jsonl, refusal, running
from tests.serve_worker import WorkerProcess
from tests.waiting import wait_for

PROMPT = "What does a lantern mean?"
CHAT: Any = [{"role": "user", "content": PROMPT}]
USAGE = "/v1/organization/usage/completions"
Sums = dict[str, int]


@pytest.fixture
def admin(service: Service) -> Iterator[openai.OpenAI]:
    """The stock client as an operator's script makes it."""
    with openai.OpenAI(
        base_url=f"{service.url}/v1", admin_api_key=service.new_key("operators"), max_retries=0
    ) as made:
        yield made


def report(admin: openai.OpenAI, **query: Any) -> list[Any]:  # Any: results of any kind of usage
    """Returns the results of all buckets since an hour ago."""
    page = admin.admin.organization.usage.completions(start_time=int(time.time()) - 3600, **query)
    assert not page.has_more
    return [result for bucket in page.data for result in bucket.results]


def sums(results: list[Any]) -> Sums:
    names = ("num_model_requests", "input_tokens", "input_cached_tokens", "output_tokens")
    return {name: sum(getattr(result, name) for result in results) for name in names}


def total(*usages: Any) -> Sums:
    """Returns the sums of `usage` objects of chats and completions."""
    return {
        "num_model_requests": len(usages),
        "input_tokens": sum(usage.prompt_tokens for usage in usages),
        "input_cached_tokens": sum(usage.prompt_tokens_details.cached_tokens for usage in usages),
        "output_tokens": sum(usage.completion_tokens for usage in usages),
    }


def wait_for_requests(admin: openai.OpenAI, count: int, **query: Any) -> Sums:
    """Returns the sums as soon as so many requests are in the report."""
    wait_for(
        lambda: sums(report(admin, **query))["num_model_requests"] >= count, 5, "they are missing"
    )
    return sums(report(admin, **query))


def test_the_report_is_the_sum_of_the_usage_of_all_answers(
    worker: WorkerProcess, service: Service, client: openai.OpenAI, admin: openai.OpenAI
) -> None:
    key_id = client.api_key.split("-")[2]
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 9, "extra_body": {"ignore_eos": True}}
    usages: list[Any] = [
        client.completions.create(prompt=[PROMPT, "The still"], n=3, **asked).usage,
        client.completions.create(prompt=PROMPT, best_of=3, n=2, **asked).usage,
        client.completions.create(prompt=PROMPT, echo=True, logprobs=1, **asked).usage,
        client.chat.completions.create(messages=CHAT, **asked).usage,
    ]
    options: Any = {"include_usage": True}
    for stream in (
        client.chat.completions.create(
            messages=CHAT, n=2, stream=True, stream_options=options, **asked
        ),
        client.completions.create(prompt=PROMPT, stream=True, stream_options=options, **asked),
    ):
        *_, last = list(stream)
        usages.append(last.usage)
    expected = total(*usages)
    response = client.responses.create(model="tiny", input=PROMPT, max_output_tokens=16).usage
    assert response is not None
    expected["num_model_requests"] += 1
    expected["input_tokens"] += response.input_tokens
    expected["input_cached_tokens"] += response.input_tokens_details.cached_tokens
    expected["output_tokens"] += response.output_tokens
    assert wait_for_requests(admin, len(usages) + 1) == expected
    assert expected["input_cached_tokens"] > 0
    groups: Any = ["model", "api_key_id", "project_id", "batch", "service_tier", "user_id"]
    (result,) = report(admin, group_by=groups, bucket_width="1d")
    assert (result.model, result.api_key_id, result.project_id) == ("tiny", key_id, PROJECT)
    assert (result.batch, result.service_tier, result.user_id) == (False, "default", None)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(prompt=PROMPT, **asked | {"max_tokens": 10_000})
    assert sums(report(admin)) == expected, "a refused request has no usage"


def test_batches_are_reported_with_their_key_and_apart(
    worker: WorkerProcess, client: openai.OpenAI, admin: openai.OpenAI
) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8}
    line = {"method": "POST", "url": "/v1/completions", "body": body}
    lines = [line | {"custom_id": f"q-{n}"} for n in range(5)]
    file = client.files.create(file=("requests.jsonl", jsonl(lines)), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
    )
    alone = client.completions.create(**body).usage  # type: ignore[call-overload] # a dictionary
    wait_for(lambda: client.batches.retrieve(batch.id).status == "completed", 30, "it does not end")
    batch = client.batches.retrieve(batch.id)
    answers = client.files.content(batch.output_file_id or "").text.splitlines()
    used = [json.loads(answer)["response"]["body"]["usage"] for answer in answers]
    in_batch = sums(report(admin, batch=True, api_key_ids=[client.api_key.split("-")[2]]))
    assert in_batch["num_model_requests"] == 5
    assert in_batch["input_tokens"] == sum(usage["prompt_tokens"] for usage in used)
    assert in_batch["output_tokens"] == sum(usage["completion_tokens"] for usage in used)
    assert wait_for_requests(admin, 1, batch=False) == total(alone)


def test_an_aborted_answer_counts_what_was_generated_and_gives_back_the_rest(
    worker: WorkerProcess, service: Service, admin: openai.OpenAI, valkey: str
) -> None:
    key = service.new_key(limits=Limits(tokens_per_minute=26_000))
    asked: dict[str, Any] = {
        "model": "tiny",
        "prompt": [5] * 20,
        "max_tokens": 200,
        "extra_body": {"ignore_eos": True},
    }
    with service.client(key) as client, redis.Redis.from_url(valkey) as operator:
        stream = client.completions.create(**asked, n=128, stream=True)
        headers = stream.response.headers
        assert headers["x-ratelimit-remaining-tokens"] == str(26_000 - 20 - 128 * 200)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="TPM"):
            client.completions.create(**asked, n=16)
        stream.close()
        used = wait_for_requests(admin, 1, api_key_ids=[key.split("-")[2]])
        assert used["num_model_requests"] == 1
        assert used["input_tokens"] == 20
        assert 0 < used["output_tokens"] < 128 * 200
        num_used = used["input_tokens"] + used["output_tokens"]
        wait_for(lambda: level(operator) <= num_used, 5, "what was not used is not given back")


def test_a_shutdown_settles_and_records_the_answers_in_progress(
    worker: WorkerProcess, service: Service, admin: openai.OpenAI, valkey: str
) -> None:
    key = service.new_key(limits=Limits(tokens_per_minute=200_000))
    asked: dict[str, Any] = {"model": "tiny", "prompt": [[5] * 20] * 6, "n": 128}
    with running(get_settings(), graceful_seconds=1) as other, other.client(key) as client:
        stream = client.completions.create(
            **asked, max_tokens=200, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
    used = sums(report(admin, api_key_ids=[key.split("-")[2]]))
    assert used["num_model_requests"] == 1
    num_used = used["input_tokens"] + used["output_tokens"]
    assert 0 < num_used < 6 * 128 * 200
    with redis.Redis.from_url(valkey) as operator:
        assert level(operator) <= num_used


def level(operator: "redis.Redis") -> float:
    """Tokens in the only bucket; 0 if it is empty."""
    levels = [operator.get(name) for name in operator.scan_iter("stillhouse:limit:*:tokens")]
    return sum(int(value.split()[0]) / UNIT for value in levels if isinstance(value, bytes))


def test_a_budget_stops_a_key_until_the_period_ends(
    worker: WorkerProcess, service: Service
) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "ignore_eos": True}
    for period, limits in (("day", Limits(daily_tokens=10)), ("month", Limits(monthly_tokens=10))):
        with service.http(service.new_key(limits=limits)) as http:
            assert http.post("/v1/completions", json=body).status_code == 200
            refused = http.post("/v1/completions", json=body)
            assert refusal(refused) == (429, "insufficient_quota", None)
            assert refused.headers["x-should-retry"] == "false"
            message = refused.json()["error"]["message"]
            assert f"its budget of 10 tokens per {period}; requests are refused until 2" in message
            assert "T00:00:00Z" in message
            wait_for(partial(refuses_batches, http), 5, "a batch is accepted")
    with service.http() as unlimited:
        assert unlimited.post("/v1/completions", json=body).status_code == 200


def refuses_batches(http: httpx.Client) -> bool:
    """Whether the budget of a key also holds for batches. The file, which does not exist, is read later."""
    body = {"input_file_id": "file-0", "completion_window": "24h", "endpoint": "/v1/completions"}
    return refusal(http.post("/v1/batches", json=body))[1] == "insufficient_quota"


def add(minute_offset: int, num_requests: int, **columns: Any) -> None:
    """Inserts usage of so many minutes ago."""
    fields: dict[str, Any] = {
        "project_id": PROJECT,
        "key_id": "k1",
        "model": "tiny",
        "is_batch": False,
    }
    key = UsageKey(this_minute() - timedelta(minutes=minute_offset), **fields | columns)
    with transaction() as session:
        add_usage(session, [(key, UsageCounts(num_requests, 10 * num_requests, 0, num_requests))])


def test_buckets_are_paged_filtered_and_grouped(service: Service, admin: openai.OpenAI) -> None:
    now = int(this_minute().timestamp())
    for minutes, num_requests in ((0, 1), (1, 2), (5, 4), (130, 8)):
        add(minutes, num_requests)
    add(1, 16, model="other", key_id="k2", project_id="rival")
    usage = admin.admin.organization.usage
    page = usage.completions(start_time=now - 5 * 60, bucket_width="1m", limit=4)
    assert page.object == "page"
    assert [bucket.start_time for bucket in page.data] == [now - 60 * n for n in (5, 4, 3, 2)]
    assert [bucket.end_time - bucket.start_time for bucket in page.data] == [60] * 4
    assert [len(bucket.results) for bucket in page.data] == [1, 0, 0, 0]
    assert page.has_more
    rest = usage.completions(
        start_time=now - 5 * 60, bucket_width="1m", limit=4, page=page.next_page or ""
    )
    results: Any = [result for bucket in rest.data for result in bucket.results]
    assert [result.num_model_requests for result in results] == [18, 1]
    assert (rest.has_more, rest.next_page) == (False, None)
    hours: Any = usage.completions(start_time=now - 140 * 60, bucket_width="1h")
    assert sum(r.num_model_requests for b in hours.data for r in b.results) == 31
    assert {bucket.start_time % 3600 for bucket in hours.data} == {0}
    until = usage.completions(start_time=now - 140 * 60, end_time=now - 60, bucket_width="1h")
    assert sums([r for b in until.data for r in b.results])["num_model_requests"] == 12
    assert sums(report(admin, models=["other"], project_ids=["rival", "x"]))["input_tokens"] == 160
    assert report(admin, api_key_ids=["k9"]) == report(admin, user_ids=["u"]) == []
    grouped = report(admin, group_by=["api_key_id", "project_id"], bucket_width="1d")
    assert {(r.api_key_id, r.project_id) for r in grouped} == {("k1", PROJECT), ("k2", "rival")}
    assert {r.model for r in grouped} == {None}


def test_a_key_without_admin_reads_the_usage_of_its_own_project(service: Service) -> None:
    add(0, 1)
    add(0, 2, project_id="rival")
    start: dict[str, Any] = {"start_time": int(time.time()) - 3600, "group_by[]": "project_id"}
    with service.http(service.new_key("rival", scopes=["inference"])) as http:
        buckets = http.get(USAGE, params=start).json()["data"]
        rows = [result for bucket in buckets for result in bucket["results"]]
        assert [(row["project_id"], row["num_model_requests"]) for row in rows] == [("rival", 2)]
        theirs = http.get(USAGE, params=start | {"project_ids[]": PROJECT})
        assert refusal(theirs) == (403, "insufficient_scope", None)


def test_bad_queries_are_named(http: httpx.Client) -> None:
    queries: list[tuple[dict[str, Any], str]] = [
        ({"start_time": None}, "start_time"),
        ({"start_time": 2**33}, "start_time"),
        ({"end_time": 5}, "end_time"),
        ({"end_time": 0}, "end_time"),
        ({"bucket_width": "2d"}, "bucket_width"),
        ({"limit": 0}, "limit"),
        ({"limit": 32}, "limit"),
        ({"limit": 1441, "bucket_width": "1m"}, "limit"),
        ({"group_by[]": "colour"}, "group_by"),
        ({"page": "page_7"}, "page"),
        ({"page": "x"}, "page"),
        ({"models[]": "m" * 201}, "models"),
        ({"batch": "perhaps"}, "batch"),
        ({"colour": "red"}, "colour"),
    ]
    good = {"start_time": int(time.time()) - 3600}
    for query, param in queries:
        params = {name: value for name, value in (good | query).items() if value is not None}
        assert refusal(http.get(USAGE, params=params))[::2] == (400, param), query
