"""Matches the retries of a client that sends no idempotency key to the submission that they repeat.

The OpenAI client repeats a request with the same body and a higher `x-stainless-retry-count`, and sends
nothing else that names the request. So each attempt is recorded when it arrives, before any work is done.
"""

from dataclasses import dataclass
from typing import Final

from app.auth import Principal
from app.contracts.messages import JobStatus
from app.db import jobs, submissions
from app.db.locks import lock_project
from app.db.schema.tables import Job
from app.db.session import Session, transaction

MAX_TIMEOUT_SECONDS: Final = 86_400.0  # also that of a client that names none
# The client waits up to 120 s before a retry; connecting and sending take some time too.
RETRY_DELAY_SECONDS: Final = 150.0
MAX_RETRY_COUNT: Final = 10_000  # higher counts are treated as this one


@dataclass(frozen=True)
class RetryInfo:
    """What marks a request as a repetition: its idempotency key, or the client's count of retries.

    timeout_seconds: How long the client waits for a response, as it says in a header.
    """

    idempotency_key: str | None = None
    retry_count: int = 0
    timeout_seconds: float = MAX_TIMEOUT_SECONDS


@dataclass(frozen=True)
class Submitted:
    """A recorded attempt: the submission it belongs to, and the job that an earlier attempt created.

    `submission_id` is None if the request has an idempotency key, which says all that is needed.
    """

    submission_id: int | None = None
    job: Job | None = None


def record_attempt(
    principal: Principal, route: str, attempted: RetryInfo, sha256: str
) -> Submitted:
    """Records an attempt of a submission, unless it has an idempotency key.

    An attempt without retries before it is a new submission. So is a retry whose earlier attempts never
    arrived. A job that failed or was cancelled before the retry arrived is not returned: nobody can tell
    whether this submission created it, and a new job beside one that has ended does no harm.
    """
    if attempted.idempotency_key is not None:
        return Submitted()
    request = submissions.Request(principal.project_id, principal.key_id, route, sha256)
    retry_count = min(attempted.retry_count, MAX_RETRY_COUNT)
    with transaction() as session:
        if retry_count:
            lock_project(
                session, principal.project_id
            )  # waits for an attempt that is inserting its job
            seconds = min(attempted.timeout_seconds, MAX_TIMEOUT_SECONDS) + RETRY_DELAY_SECONDS
            found = submissions.find_repeated(session, request, retry_count, retry_seconds=seconds)
            if found is not None:
                job = jobs.load_job(session, found.job_id) if found.job_id else None
                if job is None or not has_no_result(job):
                    submissions.note_retry(session, found, retry_count)
                    return Submitted(found.id, job)
        return Submitted(submissions.insert_submission(session, request, retry_count).id)


def has_no_result(job: Job) -> bool:
    is_cancelled = job.status == JobStatus.cancelled or job.cancel_requested_at is not None
    return is_cancelled or job.status == JobStatus.failed or job.deleted_at is not None


def find_created(session: Session, submitted: Submitted) -> Job | None:
    """Returns the job that another attempt created meanwhile. Call `lock_project` before."""
    if submitted.submission_id is None:
        return None
    submission = submissions.load_submission(session, submitted.submission_id)
    if submission is None or submission.job_id is None:
        return None
    return jobs.load_job(session, submission.job_id)


def remember_job(session: Session, submitted: Submitted, job: Job) -> None:
    """Makes the job the answer to later attempts. Call it in the transaction that inserts the job."""
    if submitted.submission_id is not None:
        submissions.set_job(session, submitted.submission_id, job.id)
