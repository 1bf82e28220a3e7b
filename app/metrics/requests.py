"""Metrics of the generation requests of one API process, as seen at its reply streams.

Each request is counted once when it starts and once when it ends. If none is in progress, as many
have ended as have started. All counts change on the thread of the event loop. A scrape reads them
from another thread.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, Literal, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from app.contracts.generation import Delta, Done, GenerateRequest, TaskName
from app.metrics.histogram import (
    FIRST_TOKEN_SECONDS,
    REQUEST_SECONDS,
    REQUEST_TOKENS,
    TOKEN_SECONDS,
    Histogram,
)
from app.tracing.generation import start_generation

Outcome = Literal["completed", "aborted", "failed"]
MAX_MODELS: Final = 200  # that have their own label; the others share one
OTHER_MODELS: Final = "(other)"
# Reasons for which a choice ended, as vLLM names them. The engine ends a tool call with a stop.
FINISHED_REASON: Final = {"stop": "stop", "length": "length", "tool_calls": "stop"}
UNFINISHED_REASON: Final[dict[Outcome, str]] = {"aborted": "abort", "failed": "error"}
COUNTERS: Final = {
    "vllm:prompt_tokens": "Prompt tokens of prompts that were answered",
    "vllm:prompt_tokens_cached": "Of these, tokens that were in the prefix cache",
    "vllm:generation_tokens": "Generated tokens",
}
HISTOGRAMS: Final = {
    "vllm:time_to_first_token_seconds": (
        "Time from the start of a request to the first token of each choice",
        FIRST_TOKEN_SECONDS,
    ),
    "vllm:inter_token_latency_seconds": ("Time between two tokens of a choice", TOKEN_SECONDS),
    "vllm:request_time_per_output_token_seconds": (
        "Mean time per token after the first one, per prompt",
        TOKEN_SECONDS,
    ),
    "vllm:e2e_request_latency_seconds": (
        "Time from the start of a request to the end of each answered prompt",
        REQUEST_SECONDS,
    ),
    "vllm:request_prompt_tokens": ("Tokens per answered prompt", REQUEST_TOKENS),
    "vllm:request_generation_tokens": ("Generated tokens per answered prompt", REQUEST_TOKENS),
}


class RequestCounts:
    """Counts of the requests of one model and one task."""

    def __init__(self) -> None:
        self.num_started = 0
        self.ended: dict[Outcome, int] = dict.fromkeys(get_args(Outcome), 0)
        self.finished = dict.fromkeys(("stop", "length", "abort", "error"), 0)
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.histograms = {name: Histogram(bounds) for name, (_, bounds) in HISTOGRAMS.items()}
        self.first_token, self.inter_token = (
            self.histograms["vllm:time_to_first_token_seconds"],
            self.histograms["vllm:inter_token_latency_seconds"],
        )


class RequestMeter:
    """Measures one request. `end` is called exactly once, by its reply stream."""

    def __init__(self, counts: RequestCounts, requests: Sequence[GenerateRequest]) -> None:
        self._span = start_generation(requests[0], "client")
        self._counts = counts
        self._is_generation = requests[0].task == "generate"
        self._num_sequences = requests[0].num_sequences
        self._num_unfinished = sum(request.n for request in requests)
        self._began_at = time.monotonic()
        self._heard_at: dict[tuple[int, int], float] = {}  # by prompt and choice
        self._first_at: dict[int, float] = {}  # by prompt
        self._num_tokens: dict[int, int] = {}  # counted so far, by prompt
        counts.num_started += 1

    @property
    def traceparent(self) -> str | None:
        """Context of the request's span, or None if tracing is off."""
        return None if self._span is None else self._span.traceparent

    def note(self, index: int, reply: Delta | Done, now: float) -> None:
        """Counts a reply to the prompt with this index. `now` is the monotonic time."""
        if not self._is_generation:
            return
        if self._span is not None:
            self._span.note(reply)
        if isinstance(reply, Delta):
            self._note_delta(index, reply, now)
        else:
            self._note_done(index, reply, now)

    def end(self, outcome: Outcome, error: str | None = None) -> None:
        """Counts the end of the request, and its choices that have no finish reason.

        error: Code of the error, if the request has failed.
        """
        self._counts.ended[outcome] += 1
        if outcome != "completed" and self._is_generation:
            self._counts.finished[UNFINISHED_REASON[outcome]] += self._num_unfinished
        if self._span is not None:
            self._span.end(outcome, error)

    def _note_delta(self, index: int, delta: Delta, now: float) -> None:
        choice, num_tokens = (index, delta.choice), len(delta.tokens)
        heard_at = self._heard_at.get(choice)
        if heard_at is None:
            self._counts.first_token.observe(now - self._began_at)
            self._first_at.setdefault(index, now)
            self._heard_at[choice] = now
        elif num_tokens:
            self._counts.inter_token.observe((now - heard_at) / num_tokens, num_tokens)
            self._heard_at[choice] = now
        self._num_tokens[index] = self._num_tokens.get(index, 0) + num_tokens
        self._counts.generated_tokens += num_tokens
        if delta.finish_reason is not None:
            self._num_unfinished -= 1
            self._counts.finished[FINISHED_REASON[delta.finish_reason]] += 1

    def _note_done(self, index: int, done: Done, now: float) -> None:
        counts, histograms = self._counts, self._counts.histograms
        # Deltas leave out end tokens, and the choices of `best_of` that are not returned.
        counts.generated_tokens += max(0, done.completion_tokens - self._num_tokens.get(index, 0))
        counts.prompt_tokens += done.prompt_tokens
        counts.cached_tokens += done.cached_tokens
        num_later = done.completion_tokens / self._num_sequences - 1
        if num_later > 0:
            seconds = (now - self._first_at.get(index, self._began_at)) / num_later
            histograms["vllm:request_time_per_output_token_seconds"].observe(seconds)
        histograms["vllm:e2e_request_latency_seconds"].observe(now - self._began_at)
        histograms["vllm:request_prompt_tokens"].observe(done.prompt_tokens)
        histograms["vllm:request_generation_tokens"].observe(done.completion_tokens)


class RequestMetrics(Collector):
    """Counts of all requests of an API process, by model and task.

    The number of models with their own label is limited. Only models that exist become labels,
    because a request is counted after its model was found.
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[str, TaskName], RequestCounts] = {}
        self.num_sent_again = 0

    def begin(self, requests: Sequence[GenerateRequest]) -> RequestMeter:
        """Counts a started request and returns its meter. Its prompts have the same model."""
        return RequestMeter(self._counts_of(requests[0].model, requests[0].task), requests)

    def _counts_of(self, model: str, task: TaskName) -> RequestCounts:
        found = self._counts.get((model, task))
        if found is None:
            is_new = all(model != known for known, _ in self._counts)
            if is_new and len({known for known, _ in self._counts}) >= MAX_MODELS:
                model = OTHER_MODELS
            found = self._counts.setdefault((model, task), RequestCounts())
        return found

    def collect(self) -> Iterator[Metric]:
        """Yields the metric families of a scrape."""
        counts = list(self._counts.items())
        yield from _accounting(counts)
        sent_again = CounterMetricFamily(
            "stillhouse_prompts_sent_again", "Prompts that were sent to another worker"
        )
        sent_again.add_metric([], self.num_sent_again)
        yield sent_again
        yield from _generation(
            [(model, each) for (model, task), each in counts if task == "generate"]
        )


def _accounting(counts: Sequence[tuple[tuple[str, TaskName], RequestCounts]]) -> Iterator[Metric]:
    labels = ["model_name", "task"]
    started = CounterMetricFamily(
        "stillhouse_requests_started", "Requests that were sent to serve workers", labels=labels
    )
    ended = CounterMetricFamily(
        "stillhouse_requests_ended",
        "Requests that were answered completely, aborted by the client, or failed",
        labels=[*labels, "outcome"],
    )
    in_progress = GaugeMetricFamily(
        "stillhouse_requests_in_progress", "Requests that have started and not ended", labels=labels
    )
    for key, each in counts:
        # Read before `num_started`: a request that starts in between must not look ended.
        num_ended = dict(each.ended)
        num_started = each.num_started
        started.add_metric(key, num_started)
        for outcome, number in num_ended.items():
            ended.add_metric([*key, outcome], number)
        in_progress.add_metric(key, num_started - sum(num_ended.values()))
    yield from (started, ended, in_progress)


def _generation(counts: Iterable[tuple[str, RequestCounts]]) -> Iterator[Metric]:
    labels = ["model_name"]
    counts = list(counts)
    success = CounterMetricFamily(
        "vllm:request_success",
        "Choices that have ended, by reason",
        labels=[*labels, "finished_reason"],
    )
    counters = {
        name: CounterMetricFamily(name, text, labels=labels) for name, text in COUNTERS.items()
    }
    for model, each in counts:
        for reason, number in each.finished.items():
            success.add_metric([model, reason], number)
        numbers = (each.prompt_tokens, each.cached_tokens, each.generated_tokens)
        for family, number in zip(counters.values(), numbers, strict=True):
            family.add_metric([model], number)
    yield from (success, *counters.values())
    for name, (text, _) in HISTOGRAMS.items():
        histogram = HistogramMetricFamily(name, text, labels=labels)
        for model, each in counts:
            filled = each.histograms[name]
            histogram.add_metric([model], filled.buckets(), filled.sum)
        yield histogram
