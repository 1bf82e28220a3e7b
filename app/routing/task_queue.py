"""Celery producer: sends wake-up messages to train workers and requests to serve workers."""

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

from app.contracts.generation import GenerateRequest
from app.contracts.messages import GENERATE_TASK, TRAIN_QUEUE, WAKE_UP_TASK, serve_queue
from app.settings import celery_settings, get_settings

log = structlog.get_logger(__name__)

# An unset URL behaves like a Redis that is down. Only redis-py accepts it: Celery knows no `unix:`.
NOWHERE = "unix:///nonexistent/redis.sock"
KEY_PREFIX = "stillhouse:"  # `global_keyprefix` of `celery_settings`
MAX_WAITING_MESSAGES = 100
# Timeout to connect or to write. A send takes at most about twice as long if Redis is down.
SEND_SECONDS = 0.5
# Any: options of several kinds
SOCKET: Final[dict[str, Any]] = dict.fromkeys(
    ("socket_timeout", "socket_connect_timeout"), SEND_SECONDS
)
RETRY_ONCE: Final = {"max_retries": 1, "interval_start": 0, "interval_step": 0}
# Properties of a Celery message in the Redis list of a queue, as kombu writes them.
MESSAGE_PROPERTIES: Final = {"delivery_mode": 2, "priority": 0, "body_encoding": "base64"}
CONTENT: Final = {"content-encoding": "utf-8", "content-type": "application/json"}
# RuntimeError: raised by uvloop for a write to a connection that has just been closed.
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
    conf["broker_transport_options"] |= {**SOCKET, **RETRY_ONCE}
    # A pooled connection may be stale after a restart of Redis: retry once, with a new connection.
    conf["task_publish_retry"] = True
    conf["task_publish_retry_policy"] = {**RETRY_ONCE, "interval_max": 0}
    producer.conf.update(conf)
    return producer


def queue_key(worker_id: str) -> str:
    """Returns the Redis key of the list that holds a serve worker's unread requests."""
    return KEY_PREFIX + serve_queue(worker_id)


def notify_workers() -> bool:
    """Sends a wake-up message to the train workers and returns whether it was sent.

    Never raises: the reconciler repairs a lost message.
    """
    redis_url = get_settings().redis_url
    if not redis_url:
        log.warning("notify_failed", reason="no redis_url")  # Celery would try RabbitMQ instead
        return False
    try:
        # declare=[]: declaring the queue would leave a binding in Redis that is never removed.
        producer = _producer(redis_url)
        producer.send_task(WAKE_UP_TASK, queue=TRAIN_QUEUE, task_id=uuid4().hex, declare=[])
    except FAULTS as fault:
        log.warning("notify_failed", reason=type(fault).__name__)
        return False
    return True


def notify_workers_again() -> None:
    """Sends a wake-up message unless MAX_WAITING_MESSAGES messages already wait in the queue.

    Busy workers look for jobs themselves when they finish, so more messages are useless. Never
    raises.
    """
    redis_url = get_settings().redis_url
    if not redis_url:
        return
    num_waiting = 0
    with suppress(*FAULTS), _producer(redis_url).connection_or_acquire() as line:
        num_waiting = line.default_channel.queue_declare(TRAIN_QUEUE).message_count
    if num_waiting < MAX_WAITING_MESSAGES:
        notify_workers()


class Outbox:
    """Sends generation requests to the queues of serve workers.

    Writes Celery messages on the event loop, in one round trip to Redis. Celery's own producer
    needs two round trips and a thread.
    """

    def __init__(self, redis_url: str) -> None:
        self._amqp = _producer(redis_url).amqp
        # One retry: a connection may be stale after a restart of Redis.
        self._redis = AsyncRedis.from_url(redis_url, **SOCKET, retry=Retry(NoBackoff(), 1))

    async def send(self, worker_id: str, request: GenerateRequest) -> None:
        """Appends the request to the worker's queue. Raises NotSent if Redis cannot be reached."""
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
            argsrepr="()",  # appears in headers and logs, which must not contain prompts
            kwargsrepr="{}",
            ignore_result=None,
        )
        place = {
            "delivery_info": {"exchange": "", "routing_key": queue},
            "delivery_tag": uuid4().hex,
        }
        body = base64.b64encode(orjson.dumps(task.body)).decode()
        properties = {**task.properties, **MESSAGE_PROPERTIES, **place}
        return orjson.dumps(
            {**CONTENT, "body": body, "headers": task.headers, "properties": properties}
        )
