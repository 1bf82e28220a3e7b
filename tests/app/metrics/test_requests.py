"""What a meter counts of the replies to a request."""

import time
from typing import Any

import pytest
from prometheus_client import generate_latest

from app.contracts.generation import Delta, Done, GenerateRequest, Sampling
from app.contracts.messages import ArtifactRef
from app.metrics.requests import MAX_MODELS, RequestMetrics
from tests.scrapes import samples_of


def scraped(metrics: RequestMetrics) -> dict[str, float]:
    return samples_of(generate_latest(metrics).decode())


def request(model: str = "m", **options: Any) -> GenerateRequest:  # Any: fields of the request
    fields: dict[str, Any] = {
        "id": "r",
        "reply_to": "",
        "model": model,
        "weights": ArtifactRef(key="models/x", bytes=1),
        "text": "x",
        "deadline_at": time.time() + 60,
    }
    return GenerateRequest(**fields | options)


def delta(choice: int = 0, *, num_tokens: int = 1, reason: Any = None) -> Delta:
    tokens = tuple(range(num_tokens))
    return Delta(id="r", choice=choice, text="x", tokens=tokens, finish_reason=reason)


def test_times_and_tokens_of_each_choice_are_counted() -> None:
    metrics = RequestMetrics()
    meter = metrics.begin([request(n=2)])
    began = time.monotonic()
    meter.note(0, delta(0), began + 1)
    meter.note(0, delta(1), began + 1)
    meter.note(0, delta(0, num_tokens=4, reason="stop"), began + 3)
    meter.note(0, delta(1, num_tokens=1, reason="length"), began + 7)
    meter.note(0, Done(id="r", prompt_tokens=5, completion_tokens=8, cached_tokens=3), began + 7)
    meter.end("completed")
    found = scraped(metrics)
    assert found['vllm:time_to_first_token_seconds_count{model_name="m"}'] == 2
    # Four tokens in 2 s and one in 6 s.
    assert found['vllm:inter_token_latency_seconds_count{model_name="m"}'] == 5
    assert found['vllm:inter_token_latency_seconds_sum{model_name="m"}'] == pytest.approx(8)
    # 8 tokens of two choices, of which 3 each came in the 6 s after the first.
    seconds = found['vllm:request_time_per_output_token_seconds_sum{model_name="m"}']
    assert seconds == pytest.approx(2)
    assert found['vllm:prompt_tokens_total{model_name="m"}'] == 5
    assert found['vllm:prompt_tokens_cached_total{model_name="m"}'] == 3
    # Seven in deltas, and the end token, whose text is left out.
    assert found['vllm:generation_tokens_total{model_name="m"}'] == 8
    for reason, number in (("stop", 1), ("length", 1), ("abort", 0), ("error", 0)):
        name = f'vllm:request_success_total{{finished_reason="{reason}",model_name="m"}}'
        assert found[name] == number


@pytest.mark.parametrize(("outcome", "reason"), [("aborted", "abort"), ("failed", "error")])
def test_choices_without_an_end_are_counted_when_their_request_ends(
    outcome: Any, reason: str
) -> None:
    metrics = RequestMetrics()
    meter = metrics.begin([request(n=3), request(n=3)])
    meter.note(1, delta(2, reason="stop"), time.monotonic())
    assert scraped(metrics)['stillhouse_requests_in_progress{model_name="m",task="generate"}'] == 1
    meter.end(outcome)
    found = scraped(metrics)
    assert found['stillhouse_requests_in_progress{model_name="m",task="generate"}'] == 0
    for name, number in ((reason, 5), ("stop", 1)):
        line = f'vllm:request_success_total{{finished_reason="{name}",model_name="m"}}'
        assert found[line] == number


def test_requests_about_a_tokenizer_count_as_requests_but_not_as_generation() -> None:
    metrics = RequestMetrics()
    meter = metrics.begin([request(task="tokenize", sampling=Sampling(max_tokens=0))])
    meter.note(0, delta(num_tokens=9), time.monotonic())
    meter.end("completed")
    found = scraped(metrics)
    assert found['stillhouse_requests_started_total{model_name="m",task="tokenize"}'] == 1
    assert not any(name.startswith("vllm:") for name in found)


def test_models_beyond_the_limit_share_a_label() -> None:
    metrics = RequestMetrics()
    for number in range(MAX_MODELS + 50):
        metrics.begin([request(f"m{number}", task="tokenize")]).end("completed")
    found = scraped(metrics)
    started = {name: value for name, value in found.items() if "requests_started_total" in name}
    assert len(started) == MAX_MODELS + 1
    assert started['stillhouse_requests_started_total{model_name="(other)",task="tokenize"}'] == 50
