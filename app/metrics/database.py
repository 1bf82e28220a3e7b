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
NO_DATABASE: Final = (DatabaseUnavailable, PoolExhausted)


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
        """Yields the metric families. Those whose query fails are left out."""
        for read in (_read_jobs, _read_queue_age, _read_speeds, self._read_size_families):
            try:
                families = read()
            except NO_DATABASE as fault:
                log.warning("database_metrics_not_read", reason=type(fault).__name__)
                return  # the others would wait for the database as well
            except Exception:
                log.exception("database_metrics_not_read")
                continue
            yield from families

    def _read_size_families(self) -> list[Metric]:
        sizes = self._known_sizes()
        return [
            _gauge(
                "stillhouse_storage_bytes",
                "Size of the stored data, by kind",
                "kind",
                sizes.num_bytes,
            ),
            _gauge(
                "stillhouse_job_attempts",
                "Ended attempts of the jobs in the database, by outcome",
                "outcome",
                sizes.num_attempts,
            ),
        ]

    def _known_sizes(self) -> Sizes:
        """Returns the last known sizes. Old ones are read again in a thread, for later scrapes."""
        if self._sizes is None:
            with self._lock:  # of several first scrapes, one reads the sizes
                return self._sizes or self._read_sizes()
        if self._is_old and self._lock.acquire(blocking=False):
            self._begin_refresh()
        return self._sizes

    @property
    def _is_old(self) -> bool:
        return time.monotonic() - self._sizes_at >= SIZE_SECONDS

    def _begin_refresh(self) -> None:
        """Starts the thread that reads the sizes and releases the lock, which must be held."""
        thread = threading.Thread(target=self._refresh, name="metric-sizes", daemon=True)
        try:
            if self._is_old:  # another scrape may have read them before the lock was taken
                thread.start()
                return
        except RuntimeError:  # no more threads: a later scrape tries again
            log.warning("sizes_not_read", reason="no thread can start")
        self._lock.release()

    def _refresh(self) -> None:
        try:
            self._read_sizes()
        except NO_DATABASE as fault:
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


def _read_jobs() -> list[Metric]:
    with transaction() as session:
        num_jobs = jobs.count_by_status(session)
    return [_gauge("stillhouse_jobs", "Jobs by status", "status", num_jobs)]


def _read_queue_age() -> list[Metric]:
    with transaction() as session:
        queue_age_seconds = health_checks.queue_age_seconds(session)
    age = GaugeMetricFamily(
        "stillhouse_queue_age_seconds",
        "Time that the oldest due job has waited for a train worker; 0 without one",
    )
    age.add_metric([], queue_age_seconds)
    return [age]


def _read_speeds() -> list[Metric]:
    with transaction() as session:
        speeds = health_checks.trainer_speeds(session)
    text = "Tokens per second of the running training jobs"
    return [_gauge("stillhouse_trainer_tokens_per_second", text, "job", speeds)]


def _gauge(
    name: str, text: str, label: str, values: dict[str, int] | dict[str, float]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
