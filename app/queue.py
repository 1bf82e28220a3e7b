"""The Celery producer: doorbells to train workers and requests to serve workers, sent by task name."""

from datetime import UTC, datetime
from functools import lru_cache
from uuid import uuid4

import structlog
from celery import Celery
from celery.exceptions import OperationalError as CeleryError
from kombu.exceptions import OperationalError as KombuError
from redis.exceptions import RedisError

from app.contracts import GENERATE_TASK, RING_TASK, TRAIN_QUEUE, GenerateRequest, serve_queue
from app.settings import celery_settings, get_settings

log = structlog.get_logger(__name__)

KEY_PREFIX = "stillhouse:"  # `global_keyprefix` of `celery_settings`
SEND_SECONDS = 0.5  # to connect or to write; a send waits at most about twice that when Redis is gone
FAULTS = (CeleryError, KombuError, RedisError, OSError)


class NotSent(Exception):
    """The queue cannot be reached."""


@lru_cache(maxsize=4)
def _producer(redis_url: str) -> Celery:
    producer = Celery("stillhouse", set_as_current=False)
    conf = celery_settings(get_settings())
    conf["broker_url"] = redis_url
    conf["broker_connection_timeout"] = SEND_SECONDS
    conf["broker_pool_acquire_timeout"] = SEND_SECONDS
    conf["broker_transport_options"] |= {
        "socket_timeout": SEND_SECONDS,
        "socket_connect_timeout": SEND_SECONDS,
        "max_retries": 1,
        "interval_start": 0,
        "interval_step": 0,
    }
    # A pooled connection may be stale after a restart of Redis: one more try, at once, on a fresh one.
    conf["task_publish_retry"] = True
    conf["task_publish_retry_policy"] = {
        "max_retries": 1,
        "interval_start": 0,
        "interval_step": 0,
        "interval_max": 0,
    }
    producer.conf.update(conf)
    return producer


def _send(task: str, queue: str, body: tuple[object, ...], expires: datetime | None = None) -> None:
    # Without declare=[] every worker that ever lived would leave a binding behind in Redis.
    # argsrepr: Celery puts it into headers and logs, where no prompt may appear.
    _producer(get_settings().redis_url).send_task(
        task,
        args=body,
        queue=queue,
        task_id=uuid4().hex,
        declare=[],
        expires=expires,
        argsrepr="()",
        kwargsrepr="{}",
    )


def queue_key(worker_id: str) -> str:
    """Redis key under which a serve worker's unread requests lie."""
    return KEY_PREFIX + serve_queue(worker_id)


def ring() -> bool:
    """Rings the train workers; False when that failed, which the reconciler repairs. Never raises."""
    try:
        _send(RING_TASK, TRAIN_QUEUE, ())
    except FAULTS as fault:
        log.warning("ring_failed", reason=type(fault).__name__)
        return False
    return True


def send_generate(worker_id: str, request: GenerateRequest) -> None:
    """Puts the request into the worker's own queue. Raises NotSent."""
    body = (request.model_dump(mode="json", exclude_defaults=True),)
    try:
        _send(GENERATE_TASK, serve_queue(worker_id), body, datetime.fromtimestamp(request.deadline_at, UTC))
    except FAULTS as fault:
        raise NotSent(f"the queue of {worker_id} cannot be reached ({type(fault).__name__})") from fault
