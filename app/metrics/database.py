"""Metrics from the database: jobs, the queue, running trainers and stored bytes."""

import threading
import time
from collections.abc import Iterator
from typing import Final, NamedTuple

import structlog
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from app.db import health_checks, jobs
from app.db.session import DatabaseUnavailable, PoolExhausted, transaction

log = structlog.get_logger(__name__)

SIZE_SECONDS: Final = 300.0  # how long sizes are kept, because reading them scans whole tables


class Sizes(NamedTuple):
    """Bytes by kind, and number of attempts by outcome."""

    num_bytes: dict[str, int]
    num_attempts: dict[str, int]


class DatabaseMetrics:
    """Reads metrics from the database. The values are the same in every API process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the reading of sizes
        self._sizes: Sizes | None = None
        self._sizes_at = 0.0

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
        sizes = self._known_sizes()
        yield _gauge(
            "stillhouse_storage_bytes", "Size of the stored data, by kind", "kind", sizes.num_bytes
        )
        yield _gauge(
            "stillhouse_job_attempts",
            "Ended attempts of the jobs in the database, by outcome",
            "outcome",
            sizes.num_attempts,
        )

    def _known_sizes(self) -> Sizes:
        """Returns the last known sizes. Old ones are read again in a thread, for later scrapes."""
        if self._sizes is None:
            with self._lock:
                return self._read_sizes()
        if time.monotonic() - self._sizes_at >= SIZE_SECONDS and self._lock.acquire(blocking=False):
            threading.Thread(target=self._refresh, name="metric-sizes", daemon=True).start()
        return self._sizes

    def _refresh(self) -> None:
        try:
            self._read_sizes()
        except (DatabaseUnavailable, PoolExhausted) as fault:
            log.warning("sizes_not_read", reason=type(fault).__name__)
        except Exception:
            log.exception("sizes_not_read")
        finally:
            self._lock.release()

    def _read_sizes(self) -> Sizes:
        with transaction() as session:
            read = Sizes(
                health_checks.stored_bytes(session), health_checks.attempts_by_outcome(session)
            )
        self._sizes, self._sizes_at = read, time.monotonic()
        return read


def _gauge(
    name: str, text: str, label: str, values: dict[str, int] | dict[str, float]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
