"""Traces of a real service and a real worker, as a collector receives them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest

from app.settings import Settings
from app.tracing.spans import is_tracing, start_tracing, stop_tracing
from tests.app.api.conftest import Service
from tests.app.api.models.test_imports import URL, parts
from tests.collector import Collector, SeenSpan
from tests.serve_worker import WorkerProcess, wait_for
from worker.jobs.supervisor import run_until_idle

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01"}
SERVER, CLIENT = 2, 3  # kinds in OTLP


@pytest.fixture
def collector(
    settings_env: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Collector]:
    """A collector that the settings name. Spans are sent soon after their end."""
    made = Collector()
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    settings_env(otlp_endpoint=made.url)
    yield made
    stop_tracing()
    made.close()


@pytest.fixture
def worker(
    collector: Collector,
    valkey: str,
    service: Service,
    register: Callable[..., str],
    settings_env: Callable[..., Settings],
    tmp_path: Path,
) -> Iterator[WorkerProcess]:
    settings_env(serve_heartbeat_seconds=0.2, num_threads=1)
    register()
    made = WorkerProcess(valkey, tmp_path / "worker.log")
    yield made
    made.close()


def only(collector: Collector, name: str, service: str) -> SeenSpan:
    wait_for(
        lambda: collector.named(name, service),
        10,
        f"no {name} of {service} among {[span.name for span in collector.spans]}",
    )
    (span,) = collector.named(name, service)
    return span


def test_a_request_is_one_trace_from_the_client_to_the_engine(
    collector: Collector, worker: WorkerProcess, client: openai.OpenAI
) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "a lantern"}],
        max_tokens=4,
        seed=7,
        extra_body={"ignore_eos": True},
        extra_headers=HEADERS,
    )
    http = only(collector, "POST /v1/chat/completions", "stillhouse-api")
    asked = only(collector, "chat tiny", "stillhouse-api")
    answered = only(collector, "chat tiny", "stillhouse-serve-worker")
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


def test_a_request_that_fails_is_an_error_of_its_span(
    collector: Collector, client: openai.OpenAI, register: Callable[..., str]
) -> None:
    register()
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model="tiny", prompt="x", max_tokens=1)
    span = only(collector, "text_completion tiny", "stillhouse-api")
    assert (span.is_error, span.attributes["error.type"]) == (True, "no_worker")


def test_a_job_continues_the_trace_of_its_submission(
    collector: Collector, http: httpx.Client, tiny_llama_dir: Path
) -> None:
    sent = http.post(URL, files=parts(tiny_llama_dir), headers=HEADERS)
    assert sent.status_code == 200, sent.text
    assert run_until_idle("worker", lambda: False) == 1
    submission = only(collector, "POST /v1/models/imports", "stillhouse-api")
    job = only(collector, "job import", "stillhouse-api")  # the supervisor runs in this process
    stage = only(collector, "stage converting", "stillhouse-api")
    assert {submission.trace_id, job.trace_id, stage.trace_id} == {TRACE_ID}
    assert (job.parent_id, stage.parent_id) == (submission.span_id, job.span_id)
    assert job.attributes["stillhouse.job.id"] == sent.json()["id"]


def test_tracing_without_an_endpoint_is_off(settings_env: Callable[..., Settings]) -> None:
    start_tracing(settings_env(), "api")
    assert not is_tracing()
