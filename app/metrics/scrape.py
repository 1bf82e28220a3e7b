"""Text of a scrape: the metrics of this process, of the serve workers and of the database."""

from collections.abc import Iterator

from prometheus_client import REGISTRY, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from app.metrics.database import DatabaseMetrics
from app.metrics.workers import worker_families
from app.routing.router import RequestRouter


class Scrape(Collector):
    """Collects the metrics of one API process."""

    def __init__(self, request_router: RequestRouter) -> None:
        self._request_router = request_router
        self._database = DatabaseMetrics()

    def collect(self) -> Iterator[Metric]:
        """Yields all metric families. Those that the database does not answer are left out."""
        yield from REGISTRY.collect()
        yield from self._request_router.metrics.collect()
        yield from worker_families(self._request_router.workers)
        yield from self._database.collect()

    def text(self) -> bytes:
        """Returns the metrics in the text format of Prometheus."""
        return generate_latest(self)
