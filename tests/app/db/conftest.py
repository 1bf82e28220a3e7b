"""A session in a transaction, and rows as a test needs them."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from app.db import jobs
from app.db.schema.tables import Job
from app.db.session import Session, transaction


@pytest.fixture
def session(database: str) -> Iterator[Session]:
    """A session in one transaction, committed when the test ends well."""
    with transaction() as session:
        yield session


@pytest.fixture
def add_job(session: Session) -> Callable[..., Job]:
    """Queues a job; keyword arguments are columns."""

    def add(job_id: str = "ftjob-1", **columns: Any) -> Job:  # Any: columns of Job
        values = {"project_id": "p", "kind": "distillation", "spec": {}, "model_id": f"ds:{job_id}"}
        return jobs.insert_job(session, id=job_id, **{**values, **columns})

    return add
