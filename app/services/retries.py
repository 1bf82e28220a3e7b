"""Matches the retries of a client without idempotency keys to the submission that they repeat.

The OpenAI client repeats a request with the same body and a higher `x-stainless-retry-count`. It
sends nothing else that identifies the request. Each attempt is therefore recorded when it arrives,
before any work is done.
"""

from dataclasses import dataclass
from typing import Final

from app.auth import Principal
from app.contracts.messages import JobStatus
from app.db import jobs, submissions
from app.db.locks import lock_project
from app.db.schema.tables import Job
from app.db.session import Session, transaction

MAX_TIMEOUT_SECONDS: Final = 86_400.0  # also the default, if a client sends none
# The OpenAI client waits up to 120 s before a retry. The rest is for connecting and sending.
RETRY_DELAY_SECONDS: Final = 150.0
MAX_RETRY_COUNT: Final = 10_000  # higher counts are treated as this one


@dataclass(frozen=True)
class RetryInfo:
    """Headers of a request that identify it as a retry.

    retry_count: Number of earlier attempts, as counted by the client.
    timeout_seconds: How long the client waits for a response.
    """

    idempotency_key: str | None = None
    retry_count: int = 0
    timeout_seconds: float = MAX_TIMEOUT_SECONDS


@dataclass(frozen=True)
class Submitted:
    """A recorded attempt: its submission, and the job that an earlier attempt created.

    `submission_id` is None if the request has an idempotency key, because the key identifies it.
    """

    submission_id: int | None = None
    job: Job | None = None


def record_attempt(
    principal: Principal, route: str, attempted: RetryInfo, sha256: str
) -> Submitted:
    """Records an attempt of a submission, unless it has an idempotency key.

    The first attempt of a client is a new submission. So is a retry whose earlier attempts never
    arrived. A job that failed, was cancelled or was deleted before the retry is not returned. It is
    not certain that this submission created it, and a new job does no harm when it has ended.
    """
    if attempted.idempotency_key is not None:
        return Submitted()
    request = submissions.Request(principal.project_id, principal.key_id, route, sha256)
    retry_count = min(attempted.retry_count, MAX_RETRY_COUNT)
    with transaction() as session:
        if retry_count:
            # Waits for an earlier attempt that is inserting its job.
            lock_project(session, principal.project_id)
            seconds = min(attempted.timeout_seconds, MAX_TIMEOUT_SECONDS) + RETRY_DELAY_SECONDS
            found = submissions.find_repeated(session, request, retry_count, retry_seconds=seconds)
            if found is not None:
                job = jobs.load_job(session, found.job_id) if found.job_id else None
                if job is None or not has_no_result(job):
                    submissions.note_retry(session, found, retry_count)
                    return Submitted(found.id, job)
        return Submitted(submissions.insert_submission(session, request, retry_count).id)


def has_no_result(job: Job) -> bool:
    """Returns whether the job failed, was deleted, or is cancelled or being cancelled."""
    is_cancelled = job.status == JobStatus.cancelled or job.cancel_requested_at is not None
    return is_cancelled or job.status == JobStatus.failed or job.deleted_at is not None


def find_created(session: Session, submitted: Submitted) -> Job | None:
    """Returns the job that another attempt of the submission has created since, or None.

    Call `lock_project` before.
    """
    if submitted.submission_id is None:
        return None
    submission = submissions.load_submission(session, submitted.submission_id)
    if submission is None or submission.job_id is None:
        return None
    return jobs.load_job(session, submission.job_id)


def remember_job(session: Session, submitted: Submitted, job: Job) -> None:
    """Records the job for later attempts of the submission.

    Call it in the transaction that inserts the job.
    """
    if submitted.submission_id is not None:
        submissions.set_job(session, submitted.submission_id, job.id)
