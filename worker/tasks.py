"""The Celery tasks: each hands its work over, or works until there is none left."""

from collections.abc import Callable

from celery import Celery

from app.contracts.messages import GENERATE_TASK, WAKE_UP_TASK, GenerateRequest, JsonObject


def add_generate(app: Celery, submit: Callable[[GenerateRequest], None]) -> None:
    """`serve.generate`: gives the request to the engine thread and returns."""

    def generate(body: JsonObject) -> None:
        submit(GenerateRequest.model_validate(body))

    app.task(generate, name=GENERATE_TASK)


def add_wake_up(app: Celery, work: Callable[[], None]) -> None:
    """`train.ring`: works until no job is due; the message itself says nothing."""
    app.task(work, name=WAKE_UP_TASK)
