"""Metrics from the database: jobs, the queue, running trainers and stored bytes."""

import threading
import time
from collections.abc import Iterator
from typing import Final

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from app.db import health_checks, jobs
from app.db.session import transaction

SIZE_SECONDS: Final = 60.0  # how long sizes are kept, because they take a scan of whole tables


class DatabaseMetrics:
    """Reads metrics from the database. The values are the same in every API process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sizes_at = -SIZE_SECONDS
        self._sizes: tuple[dict[str, int], dict[str, int]] = ({}, {})

    def collect(self) -> Iterator[Metric]:
        """Yields the metric families. Raises DatabaseUnavailable or PoolExhausted."""
        with transaction() as session:
            num_jobs = jobs.count_by_status(session)
            queue_age_seconds = health_checks.queue_age_seconds(session)
            speeds = health_checks.trainer_speeds(session)
        yield _gauge("stillhouse_jobs", "Jobs by status", "status", num_jobs)
        age = GaugeMetricFamily(
            "stillhouse_queue_age_seconds",
            "Time that the oldest due job has waited for a train worker; 0 without one",
        )
        age.add_metric([], queue_age_seconds)
        yield age
        yield _gauge(
            "stillhouse_trainer_tokens_per_second",
            "Tokens per second of the running training jobs",
            "job",
            speeds,
        )
        num_bytes, num_attempts = self._read_sizes()
        yield _gauge(
            "stillhouse_storage_bytes", "Size of the stored data, by kind", "kind", num_bytes
        )
        yield _gauge(
            "stillhouse_job_attempts",
            "Ended attempts of the jobs in the database, by outcome",
            "outcome",
            num_attempts,
        )

    def _read_sizes(self) -> tuple[dict[str, int], dict[str, int]]:
        with self._lock:
            if time.monotonic() - self._sizes_at >= SIZE_SECONDS:
                with transaction() as session:
                    self._sizes = (
                        health_checks.stored_bytes(session),
                        health_checks.attempts_by_outcome(session),
                    )
                self._sizes_at = time.monotonic()
            return self._sizes


def _gauge(
    name: str, text: str, label: str, values: dict[str, int] | dict[str, float]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
