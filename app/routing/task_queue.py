"""The Celery producer: doorbells to train workers and requests to serve workers, sent by task name."""

import base64
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final
from uuid import uuid4

import orjson
import structlog
from celery import Celery
from celery.exceptions import OperationalError as CeleryError
from kombu.exceptions import OperationalError as KombuError
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from app.contracts.messages import (
    GENERATE_TASK,
    TRAIN_QUEUE,
    WAKE_UP_TASK,
    GenerateRequest,
    serve_queue,
)
from app.settings import celery_settings, get_settings

log = structlog.get_logger(__name__)

KEY_PREFIX = "stillhouse:"  # `global_keyprefix` of `celery_settings`
MAX_WAITING_RINGS = 100
SEND_SECONDS = (
    0.5  # to connect or to write; a send waits at most about twice that when Redis is gone
)
# Any: options of several kinds
SOCKET: Final[dict[str, Any]] = dict.fromkeys(
    ("socket_timeout", "socket_connect_timeout"), SEND_SECONDS
)
ONCE_MORE: Final = {"max_retries": 1, "interval_start": 0, "interval_step": 0}
# As kombu lays a message of Celery's into a list of Redis.
LAID: Final = {"delivery_mode": 2, "priority": 0, "body_encoding": "base64"}
CONTENT: Final = {"content-encoding": "utf-8", "content-type": "application/json"}
# RuntimeError: uvloop's, for a write on a connection that was closed a moment before
FAULTS = (CeleryError, KombuError, RedisError, OSError, RuntimeError)


class NotSent(Exception):
    """The queue cannot be reached."""


@lru_cache(maxsize=4)
def _producer(redis_url: str) -> Celery:
    producer = Celery("stillhouse", set_as_current=False)
    conf = celery_settings(get_settings())
    conf["broker_url"] = redis_url
    conf["broker_connection_timeout"] = SEND_SECONDS
    conf["broker_pool_acquire_timeout"] = SEND_SECONDS
    conf["broker_transport_options"] |= {**SOCKET, **ONCE_MORE}
    # A pooled connection may be stale after a restart of Redis: one more try, at once, on a fresh one.
    conf["task_publish_retry"] = True
    conf["task_publish_retry_policy"] = {**ONCE_MORE, "interval_max": 0}
    producer.conf.update(conf)
    return producer


def queue_key(worker_id: str) -> str:
    """Redis key under which a serve worker's unread requests lie."""
    return KEY_PREFIX + serve_queue(worker_id)


def notify_workers() -> bool:
    """Rings the train workers; False when that failed, which the reconciler repairs. Never raises."""
    try:
        # Without declare=[] every worker that ever lived would leave a binding behind in Redis.
        producer = _producer(get_settings().redis_url)
        producer.send_task(WAKE_UP_TASK, queue=TRAIN_QUEUE, task_id=uuid4().hex, declare=[])
    except FAULTS as fault:
        log.warning("notify_failed", reason=type(fault).__name__)
        return False
    return True


def notify_workers_again() -> None:
    """Rings, unless enough bells wait for busy workers, who look for themselves when they are done. Never raises."""
    num_waiting = 0
    with suppress(*FAULTS), _producer(get_settings().redis_url).connection_or_acquire() as line:
        num_waiting = line.default_channel.queue_declare(TRAIN_QUEUE).message_count
    if num_waiting < MAX_WAITING_RINGS:
        notify_workers()


class Outbox:
    """Requests on their way to serve workers, written on the event loop and in one trip: Celery's own producer takes two and a thread."""

    def __init__(self, redis_url: str) -> None:
        self._amqp = _producer(redis_url).amqp
        # once more: a connection may be stale after a restart of Redis
        self._redis = AsyncRedis.from_url(redis_url, **SOCKET, retry=Retry(NoBackoff(), 1))

    async def send(self, worker_id: str, request: GenerateRequest) -> None:
        """Puts the request into the worker's own queue. Raises NotSent."""
        try:
            await self._redis.lpush(
                queue_key(worker_id), self._message(serve_queue(worker_id), request)
            )
        except FAULTS as fault:
            raise NotSent(
                f"the queue of {worker_id} cannot be reached ({type(fault).__name__})"
            ) from fault

    async def aclose(self) -> None:
        await self._redis.aclose()

    def _message(self, queue: str, request: GenerateRequest) -> bytes:
        task = self._amqp.as_task_v2(
            uuid4().hex,
            GENERATE_TASK,
            args=(orjson.Fragment(request.model_dump_json(exclude_defaults=True)),),
            expires=datetime.fromtimestamp(request.deadline_at, UTC),
            argsrepr="()",  # Celery puts it into headers and logs, where no prompt may appear
            kwargsrepr="{}",
            ignore_result=None,
        )
        place = {
            "delivery_info": {"exchange": "", "routing_key": queue},
            "delivery_tag": uuid4().hex,
        }
        body = base64.b64encode(orjson.dumps(task.body)).decode()
        properties = {**task.properties, **LAID, **place}
        return orjson.dumps(
            {**CONTENT, "body": body, "headers": task.headers, "properties": properties}
        )
