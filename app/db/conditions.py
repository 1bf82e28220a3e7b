"""Conditions on the job status that match the predicates of partial indexes."""

from collections.abc import Iterable

from sqlalchemy import ColumnElement, literal

from app.contracts.messages import TERMINAL, JobStatus
from app.db.schema.tables import Job


def _status_in(statuses: Iterable[JobStatus]) -> ColumnElement[bool]:
    """Returns a condition that contains the statuses as literals.

    A generic plan for bound parameters could not use a partial index.
    """
    return Job.status.in_(
        [literal(status.value, literal_execute=True) for status in sorted(statuses)]
    )


HAS_NOT_ENDED = ~_status_in(TERMINAL)
IS_IN_QUEUE = _status_in([JobStatus.queued, JobStatus.retry_wait])
