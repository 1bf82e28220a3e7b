"""Reads the heartbeats of train workers from Redis."""

from functools import lru_cache

import structlog
from pydantic import ValidationError
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from app.contracts.train_workers import TrainWorkerStatus, train_worker_key
from app.routing.task_queue import NOWHERE
from app.settings import get_settings

log = structlog.get_logger(__name__)

READ_SECONDS = 0.5  # timeout to connect or to read


@lru_cache(maxsize=4)
def _client(redis_url: str) -> Redis:
    # One retry: a connection may be stale after a restart of Redis.
    return Redis.from_url(
        redis_url,
        socket_timeout=READ_SECONDS,
        socket_connect_timeout=READ_SECONDS,
        retry=Retry(NoBackoff(), 1),
    )


def live_train_workers() -> list[TrainWorkerStatus] | None:
    """Returns the train workers that are alive, or None if Redis does not answer.

    Heartbeats of other versions that cannot be read are skipped.
    """
    client = _client(get_settings().redis_url or NOWHERE)
    try:
        keys = list(client.scan_iter(match=train_worker_key("*"), count=1000))
        values = client.mget(keys) if keys else []
    except (RedisError, OSError) as fault:
        log.warning("train_heartbeats_unread", reason=type(fault).__name__)
        return None
    workers = []
    for value in values:
        try:
            workers.append(TrainWorkerStatus.model_validate_json(value or b""))
        except ValidationError:
            continue
    return workers
