"""A receiver, an endpoint that names it, and a clock that tests move."""

import asyncio
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text

from app.db import jobs
from app.db.session import transaction
from app.db.webhooks import endpoints
from app.db.webhooks.outbox import EVENT_TYPES
from app.services.webhooks.address_guard import AddressGuard
from app.services.webhooks.deliverer import Deliverer
from app.services.webhooks.signatures import new_secret
from tests.webhook_receiver import Receiver, open_receiver

GUARD = AddressGuard(["localhost"])


class Clock:
    """A clock that stands until a test moves it."""

    def __init__(self) -> None:
        # Ahead of the database, so that what the test inserts is due at once.
        self.now = datetime.now(UTC) + timedelta(seconds=60)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **duration: float) -> None:
        self.now += timedelta(**duration)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with open_receiver() as receiver:
        yield receiver


@pytest.fixture
def add_endpoint(database: str) -> Callable[..., str]:
    """Inserts an endpoint for all events and returns its secret."""

    def add(url: str, endpoint_id: str = "we_1", project_id: str = "p") -> str:
        secret = new_secret()
        with transaction() as session:
            endpoints.insert_endpoint(
                session,
                id=endpoint_id,
                project_id=project_id,
                name="a name",
                url=url,
                event_types=list(EVENT_TYPES),
                secret=secret,
            )
        return secret

    return add


@pytest.fixture
def end_job(database: str) -> Callable[..., str]:
    """Queues a job and cancels it, which is an event."""

    def end(job_id: str, project_id: str = "p") -> str:
        with transaction() as session:
            columns = {
                "project_id": project_id,
                "kind": "distillation",
                "spec": {},
                "model_id": job_id,
            }
            jobs.insert_job(session, id=job_id, **columns)
            jobs.request_cancel(session, job_id)
        return job_id

    return end


def deliver(clock: Clock, guard: AddressGuard = GUARD) -> int:
    """One attempt of each delivery that is due."""
    return asyncio.run(Deliverer(guard, clock=clock).deliver_due())


def deliveries_of(*columns: str) -> list[tuple[object, ...]]:
    """Columns of all deliveries, in the order of their events."""
    query = f"""SELECT {", ".join(columns)} FROM webhook_deliveries JOIN webhook_events e
                ON e.id = event_id ORDER BY e.data->>'id', endpoint_id"""
    with transaction() as session:
        return [tuple(row) for row in session.execute(text(query))]
