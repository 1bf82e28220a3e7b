"""Celery tasks of the workers: generation requests and wake-up messages."""

from collections.abc import Callable

from celery import Celery
from celery.worker.request import Request

from app.contracts.generation import GenerateRequest
from app.contracts.messages import GENERATE_TASK, WAKE_UP_TASK, JsonObject


class UnacknowledgedRequest(Request):  # type: ignore[misc]  # Celery has no types
    """A request from a queue without acknowledgements, which Celery would acknowledge nevertheless.

    Kombu ignores such an acknowledgement, but only while it knows the consumer. One that is made
    after the connection was lost would end the worker.
    """

    def acknowledge(self) -> None:
        self.acknowledged = True


def add_generate(app: Celery, submit: Callable[[GenerateRequest], None]) -> None:
    """Registers the generate task, which passes a request to the engine thread and returns."""

    def generate(body: JsonObject) -> None:
        """Parses and submits one request."""
        submit(GenerateRequest.model_validate(body))

    app.task(generate, name=GENERATE_TASK, Request=UnacknowledgedRequest)


def add_wake_up(app: Celery, work: Callable[[], None]) -> None:
    """Registers the wake-up task, which calls `work`. The message carries no data."""
    app.task(work, name=WAKE_UP_TASK)
