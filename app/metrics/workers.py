"""Metrics of the serve workers, from their heartbeats.

Each API process knows all workers, so each scrape has the same series. Only live workers have any.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from app.contracts.control import EngineLoad, ServeWorkerStatus
from app.routing.worker_registry import STALLED_SECONDS

LABELS: Final = ("model_name", "engine")  # vLLM's labels; the engine is the worker


def worker_families(workers: Iterable[ServeWorkerStatus]) -> Iterator[Metric]:
    """Yields the metric families of these workers."""
    workers = list(workers)
    alive = GaugeMetricFamily(
        "stillhouse_serve_workers", "Serve workers that were alive at the last check"
    )
    alive.add_metric([], len(workers))
    stalled = GaugeMetricFamily(
        "stillhouse_serve_workers_stalled", "Of these, workers with work but no forward passes"
    )
    stalled.add_metric([], sum(worker.stalled_seconds > STALLED_SECONDS for worker in workers))
    resident = GaugeMetricFamily(
        "stillhouse_resident_model_bytes", "Memory of the loaded models", labels=["engine"]
    )
    for worker in workers:
        models = [model for model in worker.models if model.state == "resident"]
        resident.add_metric([worker.worker_id], sum(model.bytes for model in models))
    yield from (alive, stalled, resident)
    yield from _loads([(worker.worker_id, load) for worker in workers for load in worker.loads])


def _loads(loads: Sequence[tuple[str, EngineLoad]]) -> Iterator[Metric]:
    running = GaugeMetricFamily(
        "vllm:num_requests_running", "Sequences in the batch", labels=LABELS
    )
    waiting = GaugeMetricFamily(
        "vllm:num_requests_waiting", "Sequences that wait for a place in the batch", labels=LABELS
    )
    usage = GaugeMetricFamily(
        "vllm:kv_cache_usage_perc", "Used fraction of the KV cache, 1 is full", labels=LABELS
    )
    queries = CounterMetricFamily(
        "vllm:prefix_cache_queries", "Tokens looked up in the prefix cache", labels=LABELS
    )
    hits = CounterMetricFamily(
        "vllm:prefix_cache_hits", "Tokens found in the prefix cache", labels=LABELS
    )
    for worker_id, load in loads:
        labels = (load.model, worker_id)
        running.add_metric(labels, load.num_running)
        waiting.add_metric(labels, load.num_waiting)
        usage.add_metric(labels, load.kv_cache_usage)
        queries.add_metric(labels, load.num_prefix_queries)
        hits.add_metric(labels, load.num_prefix_hits)
    yield from (running, waiting, usage, queries, hits)
