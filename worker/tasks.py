"""Celery tasks of the workers: generation requests and wake-up messages."""

from collections.abc import Callable

import structlog
from celery import Celery
from celery.worker.consumer import Consumer
from kombu.message import Message
from pydantic import ValidationError

from app.contracts.generation import GenerateRequest
from app.contracts.messages import GENERATE_TASK, WAKE_UP_TASK, JsonObject

log = structlog.get_logger(__name__)


class DirectConsumer(Consumer):  # type: ignore[misc]  # Celery has no types
    """Consumer that calls a task as soon as its message is read, in the thread that reads.

    It is meant for tasks that return at once. A thread pool and the records that Celery keeps of
    each task would cost more than reading the message. Messages are neither acknowledged nor
    checked for expiry.
    """

    def create_task_handler(self, *_: object, **__: object) -> Callable[[Message], None]:
        """Returns the function that is called for each message."""
        tasks = self.app.tasks

        def handle(message: Message) -> None:
            """Calls the task of one message. An error only concerns that message."""
            try:
                args, kwargs, _ = message.payload
                tasks[message.headers["task"]](*args, **kwargs)
            except ValidationError as error:  # its text would contain the prompt
                places = [problem["loc"] for problem in error.errors(include_input=False)]
                log.error("message_invalid", fields=places)
            except Exception:
                log.exception("message_unreadable")

        return handle


def add_generate(app: Celery, submit: Callable[[GenerateRequest], None]) -> None:
    """Registers the generate task, which passes a request to the engine thread and returns."""

    def generate(body: JsonObject) -> None:
        """Parses and submits one request."""
        submit(GenerateRequest.model_validate(body))

    app.task(generate, name=GENERATE_TASK)
    app.conf.worker_consumer = DirectConsumer


def add_wake_up(app: Celery, work: Callable[[], None]) -> None:
    """Registers the wake-up task, which calls `work`. The message carries no data."""
    app.task(work, name=WAKE_UP_TASK)
