"""Worker registry: the serve workers that are alive according to their heartbeats in Redis."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import structlog
from pydantic import ValidationError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from app.contracts.control import ServeWorkerStatus
from app.contracts.generation import GenerateRequest
from app.contracts.messages import serve_worker_key

log = structlog.get_logger(__name__)

MISSES = 2  # missed heartbeats until a worker counts as dead; one may be a restart of Redis
STALLED_SECONDS = 15.0  # a worker with work but without a forward pass for so long is stalled
# RuntimeError: raised by uvloop for a write to a connection that has just been closed.
FAULTS = (RedisError, OSError, RuntimeError)


@dataclass
class WorkerSnapshot:
    """Latest known status of a serve worker.

    `idle_since` is in this process's monotonic time, because the clocks of machines may differ. It
    is None while the worker has work. `num_misses` counts refreshes in a row without a heartbeat.
    """

    status: ServeWorkerStatus
    idle_since: float | None
    num_misses: int = 0


class WorkerRegistry:
    """Keeps the status of all live serve workers and picks one for each prompt."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._snapshots: dict[str, WorkerSnapshot] = {}
        self._is_seeing = True

    @property
    def workers(self) -> list[ServeWorkerStatus]:
        """Workers whose heartbeat was found by the last refresh. Safe to read in any thread."""
        # A copy, because the event loop may add a worker while another thread iterates.
        snapshots = list(self._snapshots.values())
        return [snapshot.status for snapshot in snapshots if snapshot.num_misses == 0]

    def is_known(self, worker_id: str) -> bool:
        return worker_id in self._snapshots

    def has(self, worker_id: str, request_id: str) -> bool | None:
        """Returns whether the worker's last heartbeat lists the request as unfinished.

        Returns None if the worker is unknown or its heartbeat lists no requests.
        """
        snapshot = self._snapshots.get(worker_id)
        requests = snapshot.status.requests if snapshot else None
        return None if requests is None else request_id in requests

    def idle_since(self, worker_id: str) -> float | None:
        snapshot = self._snapshots.get(worker_id)
        return snapshot.idle_since if snapshot else None

    async def refresh(self) -> list[str] | None:
        """Reads all heartbeats and returns the ids of the workers found dead.

        Returns None if Redis did not answer. No worker counts as dead then, because an outage of
        Redis says nothing about the workers.
        """
        try:
            keys = [
                key async for key in self._redis.scan_iter(match=serve_worker_key("*"), count=1000)
            ]
            values = await self._redis.mget(keys) if keys else []
        except FAULTS as fault:
            if self._is_seeing:
                log.warning("heartbeats_unread", reason=type(fault).__name__)
            self._is_seeing = False
            return None
        self._is_seeing = True
        seen = {
            status.worker_id: status for value in values if (status := _parse(value)) is not None
        }
        now = time.monotonic()
        for worker_id, status in seen.items():
            known = self._snapshots.get(worker_id)
            is_idle = not (status.num_running or status.num_waiting or status.loading)
            was_idle_since = known.idle_since if known else None
            self._snapshots[worker_id] = WorkerSnapshot(
                status, (was_idle_since or now) if is_idle else None
            )
        return [
            worker_id
            for worker_id in self._snapshots.keys() - seen.keys()
            if self._is_dead(worker_id)
        ]

    def _is_dead(self, worker_id: str) -> bool:
        snapshot = self._snapshots[worker_id]
        snapshot.num_misses += 1
        if snapshot.num_misses < MISSES:
            return False
        del self._snapshots[worker_id]
        log.warning("serve_worker_gone", worker=worker_id)
        return True

    def pick(self, request: GenerateRequest, ours: Mapping[str, int]) -> str | None:
        """Returns the id of the worker that should take the request; None if there is none.

        Considers workers that have the model's engine and are not draining. Prefers workers that
        are not stalled, then workers that have the model and free room, then the lowest load.

        `ours` is the number of unfinished sequences that this process has sent to each worker.
        Heartbeats may not include them yet.
        """

        def rank(status: ServeWorkerStatus) -> tuple[bool, bool, int]:
            """Returns the sort key of a worker. The lowest one is picked."""
            load = max(status.num_running + status.num_waiting, ours.get(status.worker_id, 0))
            has_model = (
                request.serving_key in status.resident or request.serving_key in status.loading
            )
            is_stalled = status.stalled_seconds > STALLED_SECONDS
            return is_stalled, not (has_model and load < status.max_running), load

        engine = request.serving.engine
        able = [
            status for status in self.workers if not status.is_draining and status.can_serve(engine)
        ]
        return min(able, key=rank).worker_id if able else None


def _parse(value: bytes | str | None) -> ServeWorkerStatus | None:
    try:
        return ServeWorkerStatus.model_validate_json(value) if value is not None else None
    except ValidationError:  # a worker of another version; the others must stay usable
        log.warning("heartbeat_malformed")
        return None
