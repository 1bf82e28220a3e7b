"""Submissions without an idempotency key, to which a client's retries are matched."""

from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Final

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from app.db.schema.retry_tables import Submission

LIFETIME: Final = timedelta(hours=24)
# For submissions that created no job, so that refused requests cannot fill the table.
REFUSED_LIFETIME: Final = timedelta(hours=1)


@dataclass(frozen=True)
class Request:
    """Properties that all attempts of one submission share."""

    project_id: str
    key_id: str
    route: str
    request_sha256: str


def insert_submission(session: Session, request: Request, retry_count: int) -> Submission:
    """Inserts a submission; its first attempt that arrived is retry number `retry_count`."""
    row = Submission(**asdict(request), retry_count=retry_count)
    session.add(row)
    session.flush()
    return row


def find_repeated(
    session: Session, request: Request, retry_count: int, *, retry_seconds: float
) -> Submission | None:
    """Returns the submission that is retried, or None if no earlier attempt arrived.

    A client sends each retry within `retry_seconds` after the attempt before it, so attempts that
    did not arrive extend the search. If several submissions match, the one with the newest attempt
    is returned. Call `lock_project` before.
    """
    num_missed = retry_count - Submission.retry_count
    query = select(Submission).where(
        Submission.project_id == request.project_id,
        Submission.request_sha256 == request.request_sha256,
        Submission.attempted_at > func.now() - LIFETIME,
        Submission.attempted_at > func.now() - num_missed * timedelta(seconds=retry_seconds),
        Submission.retry_count < retry_count,
        Submission.key_id == request.key_id,
        Submission.route == request.route,
    )
    query = query.order_by(Submission.attempted_at.desc(), Submission.id.desc())
    return session.scalars(query.limit(1)).one_or_none()


def note_retry(session: Session, submission: Submission, retry_count: int) -> None:
    """Records another attempt of the submission."""
    submission.retry_count = retry_count
    submission.attempted_at = func.now()
    session.flush()


def load_submission(session: Session, submission_id: int) -> Submission | None:
    """Returns the current row of the submission. Call `lock_project` before."""
    return session.get(Submission, submission_id, populate_existing=True)


def set_job(session: Session, submission_id: int, job_id: str) -> None:
    """Records the job that the submission created."""
    session.execute(update(Submission).where(Submission.id == submission_id).values(job_id=job_id))


def forget_old(session: Session) -> None:
    """Deletes submissions older than LIFETIME, or than REFUSED_LIFETIME if they created no job."""
    is_over = Submission.attempted_at <= func.now() - LIFETIME
    is_fruitless = Submission.job_id.is_(None) & (
        Submission.attempted_at <= func.now() - REFUSED_LIFETIME
    )
    gone = delete(Submission).where(is_over | is_fruitless)
    session.execute(gone.execution_options(synchronize_session=False))
