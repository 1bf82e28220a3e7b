"""Metrics and traces of a real service, also after faults."""

import json
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import httpx
import openai
import pytest
import yaml

from app.local.embedded_servers import LocalValkey
from app.settings import Settings
from app.tracing.spans import is_tracing, start_tracing, stop_tracing
from tests.app.api.conftest import Service
from tests.app.api.models.test_imports import URL, parts
from tests.collector import Collector, SeenSpan
from tests.scrapes import missing_ends, samples_of, scrape, total
from tests.serve_worker import ROOT, WorkerProcess
from tests.waiting import wait_for
from worker.jobs.supervisor import run_until_idle

PROMPT = "What does a lantern mean?"
DEPLOY = ROOT / "deploy"
# Words of our expressions that are not metrics. Prometheus makes the series `up` itself.
PROMQL = {"sum", "max", "rate", "increase", "histogram_quantile", "label_values", "up"}
PROMQL |= {"or", "absent"}
PROMQL |= {"model_name"}  # the label that `label_values` lists
TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01"}
SERVER, CLIENT = 2, 3  # kinds in OTLP


@pytest.fixture(scope="module")
def own_valkey(service_dir: Path) -> Iterator[LocalValkey]:
    """A server of this module's own, because the last test restarts it."""
    with LocalValkey(service_dir / "metrics") as server:
        yield server


@pytest.fixture(scope="module")
def valkey_url(own_valkey: LocalValkey) -> str:
    return own_valkey.url


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


@pytest.fixture(scope="module")
def shared_worker(
    own_valkey: LocalValkey, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[WorkerProcess, Path]]:
    """A worker that sends its spans to the collector, and the store that it reads."""
    folder = tmp_path_factory.mktemp("worker")
    environment = {
        "STILLHOUSE_STORE_URL": str(folder / "store"),
        "STILLHOUSE_SERVE_HEARTBEAT_SECONDS": "0.2",
        "STILLHOUSE_NUM_THREADS": "1",
        "STILLHOUSE_OTLP_ENDPOINT": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": "50",
    }
    worker = WorkerProcess(own_valkey.url, folder / "log", environment)
    yield worker, folder / "store"
    worker.close()


@pytest.fixture
def traces(
    collector: Collector, settings_env: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Collector]:
    """The collector, which the settings of this test name."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    settings_env(otlp_endpoint=collector.url)
    collector.spans.clear()
    yield collector
    stop_tracing()


def test_a_scrape_has_the_metrics_of_requests_workers_and_jobs(
    worker: WorkerProcess, client: openai.OpenAI, http: httpx.Client
) -> None:
    prompt = 4 * PROMPT  # short prompts are not kept in the prefix cache
    asked: dict[str, Any] = {"model": "tiny", "prompt": prompt, "extra_body": {"ignore_eos": True}}
    usages = [client.completions.create(max_tokens=8, n=2, **asked).usage for _ in range(2)]
    chunks = list(client.completions.create(max_tokens=8, stream=True, **asked))
    assert chunks
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="no-such-model", prompt=PROMPT)

    def has_cache_hits() -> bool:
        return total(scrape(http), "vllm:prefix_cache_hits_total", engine=worker.id) > 0

    wait_for(has_cache_hits, 5, "no heartbeat has the hits of the prefix cache")
    found = scrape(http)
    assert total(found, "stillhouse_requests_ended_total", outcome="completed") == 3
    assert total(found, "vllm:time_to_first_token_seconds_count", model_name="tiny") == 5
    assert total(found, "vllm:request_success_total", finished_reason="length") == 5
    num_generated = sum(usage.completion_tokens for usage in usages if usage) + 8
    assert total(found, "vllm:generation_tokens_total") == num_generated
    num_read = sum(usage.prompt_tokens for usage in usages if usage)
    assert total(found, "vllm:prompt_tokens_total") == num_read * 3 / 2
    running = f'vllm:num_requests_running{{engine="{worker.id}",model_name="tiny"}}'
    wait_for(lambda: scrape(http)[running] == 0, 5, "the heartbeats still show a sequence")
    assert total(found, "stillhouse_storage_bytes", kind="models") > 0
    assert found["stillhouse_queue_age_seconds"] == 0
    assert not any("no-such-model" in name for name in found)


def test_each_metric_of_a_panel_or_an_alert_is_exported(
    worker: WorkerProcess, client: openai.OpenAI, http: httpx.Client
) -> None:
    client.completions.create(model="tiny", prompt=PROMPT, max_tokens=2)
    wait_for(lambda: total(scrape(http), "vllm:prefix_cache_queries_total") > 0, 5, "no heartbeat")
    text = http.get("/metrics").text
    exported = {name.partition("{")[0] for name in samples_of(text)}
    # Without a running job or a fault, a family has no samples. A histogram has those of requests.
    exported |= set(re.findall(r"^# TYPE (\S+) (?:gauge|counter)$", text, re.MULTILINE))
    used = {where: names_in(expression) for where, expression in expressions().items()}
    assert len(used) > 40
    assert {where: names - exported for where, names in used.items() if names - exported} == {}


def expressions() -> dict[str, str]:
    """All expressions of the dashboard and of the alerts, by the name of the panel or the alert."""
    dashboard = json.loads((DEPLOY / "grafana/dashboards/stillhouse.json").read_text())
    rules = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())
    found = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
    }
    for rule in rules["groups"][0]["rules"]:
        assert rule["annotations"].keys() == {"summary", "description"}
        found[rule["alert"]] = rule["expr"]
    (models,) = [one for one in dashboard["templating"]["list"] if one["name"] == "model"]
    return found | {"variable model": models["query"]["query"]}


def names_in(expression: str) -> set[str]:
    """The metrics of an expression: its words, without matchers, ranges, groups and functions."""
    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]|by \([^)]*\)', " ", expression)
    return {word for word in re.findall(r"[a-zA-Z_:][\w:]*", bare) if word not in PROMQL}


def only(collector: Collector, name: str, service: str) -> SeenSpan:
    wait_for(
        lambda: collector.named(name, service),
        10,
        f"no {name} of {service} among {[span.name for span in collector.spans]}",
    )
    (span,) = collector.named(name, service)
    return span


def test_a_request_is_one_trace_from_the_client_to_the_engine(
    traces: Collector, worker: WorkerProcess, client: openai.OpenAI
) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "a lantern"}],
        max_tokens=4,
        seed=7,
        extra_body={"ignore_eos": True},
        extra_headers=HEADERS,
    )
    http = only(traces, "POST /v1/chat/completions", "stillhouse-api")
    asked = only(traces, "chat tiny", "stillhouse-api")
    answered = only(traces, "chat tiny", "stillhouse-serve-worker")
    assert {http.trace_id, asked.trace_id, answered.trace_id} == {TRACE_ID}
    parents = (http.parent_id, asked.parent_id, answered.parent_id)
    assert parents == (SPAN_ID, http.span_id, asked.span_id)
    assert (http.kind, asked.kind, answered.kind) == (SERVER, CLIENT, SERVER)
    assert http.attributes["http.response.status_code"] == 200
    assert answer.usage is not None
    for span in (asked, answered):
        expected = {
            "gen_ai.operation.name": "chat",
            "gen_ai.request.model": "tiny",
            "gen_ai.request.max_tokens": 4,
            "gen_ai.request.seed": 7,
            "gen_ai.response.id": answer.id,
            "gen_ai.usage.input_tokens": answer.usage.prompt_tokens,
            "gen_ai.usage.output_tokens": 4,
            "stillhouse.outcome": "completed",
        }
        assert span.attributes | expected == span.attributes
        assert span.attributes["gen_ai.response.finish_reasons"] == ["length"]
        assert "lantern" not in str(span.attributes)


def test_a_job_continues_the_trace_of_its_submission(
    traces: Collector, http: httpx.Client, tiny_llama_dir: Path
) -> None:
    sent = http.post(URL, files=parts(tiny_llama_dir), headers=HEADERS)
    assert sent.status_code == 200, sent.text
    assert run_until_idle("worker", lambda: False) == 1
    submission = only(traces, "POST /v1/models/imports", "stillhouse-api")
    job = only(traces, "job import", "stillhouse-api")  # the supervisor runs in this process
    stage = only(traces, "stage converting", "stillhouse-api")
    assert {submission.trace_id, job.trace_id, stage.trace_id} == {TRACE_ID}
    assert (job.parent_id, stage.parent_id) == (submission.span_id, job.span_id)
    assert job.attributes["stillhouse.job.id"] == sent.json()["id"]


def test_tracing_without_an_endpoint_is_off(settings_env: Callable[..., Settings]) -> None:
    start_tracing(settings_env(), "api")
    assert not is_tracing()


class Callers:
    """Clients that send one request after the other until they are stopped."""

    def __init__(self, service: Service, num_callers: int) -> None:
        self.told: Counter[str] = Counter()
        self._is_over = threading.Event()
        self._service = service
        self._pool = ThreadPoolExecutor(num_callers)
        self._work = [self._pool.submit(self._call, number) for number in range(num_callers)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def until(self, told: str, more: int) -> None:
        before = self.told.copy()
        try:
            wait_for(lambda: self.told[told] >= before[told] + more, 30)
        except AssertionError:
            raise AssertionError(f"too few are {told}: {before} became {self.told}") from None

    def stop(self) -> None:
        self._is_over.set()
        for work in self._work:
            work.result(60)
        self._pool.shutdown()

    def _call(self, number: int) -> None:
        with self._service.client() as client:
            turn = number
            while not self._is_over.is_set():
                turn += 1
                self.told["sent"] += 1
                try:
                    self.told[self._ask(client, turn % 3)] += 1
                except openai.APIError:
                    self.told["refused"] += 1

    def _ask(self, client: openai.OpenAI, kind: int) -> str:
        asked: dict[str, Any] = {"model": "tiny", "prompt": [PROMPT, "A lantern"], "n": 2}
        asked |= {"max_tokens": 24, "extra_body": {"ignore_eos": True}}
        if kind == 0:
            client.completions.create(**asked)
            return "answered"
        with client.completions.create(**asked | {"max_tokens": 200}, stream=True) as stream:
            for count, _ in enumerate(stream):
                if kind == 1 and count == 2:
                    return "left"
        return "answered"


def test_each_started_request_is_completed_aborted_or_failed_after_faults(
    worker: WorkerProcess, service: Service, own_valkey: LocalValkey
) -> None:
    """Kills the worker of the module, so the tests that need one come before."""
    with Callers(service, 6) as callers:
        callers.until("answered", 6)
        callers.until("left", 4)
        own_valkey.stop()
        url = own_valkey.url
        assert own_valkey.start() == url
        callers.until("answered", 4)
        worker.stop(signal.SIGKILL)
        callers.until("refused", 6)
    with service.http() as http:
        wait_for(lambda: missing_ends(scrape(http)) == 0, 10, "a request has no end")
        found = scrape(http)
    assert total(found, "stillhouse_requests_started_total") == callers.told["sent"]
    assert total(found, "stillhouse_requests_in_progress") == 0
    ended = {
        outcome: total(found, "stillhouse_requests_ended_total", outcome=outcome)
        for outcome in ("completed", "aborted", "failed")
    }
    assert ended["completed"] >= callers.told["answered"]
    assert ended["aborted"] > 0
    assert ended["failed"] > 0
    # Two prompts with two choices each. Each choice has one reason for its end.
    assert total(found, "vllm:request_success_total") == 4 * callers.told["sent"]


def test_a_request_that_fails_is_an_error_of_its_span(
    traces: Collector, client: openai.OpenAI, register: Callable[..., str]
) -> None:
    """No worker of this module is alive any more."""
    register()
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model="tiny", prompt="x", max_tokens=1)
    span = only(traces, "text_completion tiny", "stillhouse-api")
    assert (span.is_error, span.attributes["error.type"]) == (True, "no_worker")
