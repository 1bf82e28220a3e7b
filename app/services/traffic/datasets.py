"""Accepts jobs that make data sets from stored completions, and deletes data sets."""

import secrets
import time
from typing import Final

from app.auth import Principal
from app.contracts.datasets import SIDES, DatasetJob
from app.db import files, jobs
from app.db.schema.tables import Job
from app.db.session import Session, transaction
from app.db.traffic import completions, datasets
from app.db.traffic.completions import CompletionFilter
from app.errors import BadRequest, Conflict, QuotaExceeded
from app.schemas.traffic import CreateDataset
from app.services.jobs import (
    Accepted,
    find_replay,
    fingerprint,
    get_job,
    insert_once,
    replayed,
)
from app.services.retries import RetryInfo, record_attempt
from app.settings import Settings, get_settings
from app.storage import store

ROUTE: Final = "POST /v1/datasets"


def create_dataset(principal: Principal, asked: CreateDataset, attempted: RetryInfo) -> Accepted:
    """Queues a job that makes a data set, or returns the response to an earlier attempt.

    Raises:
        BadRequest: The filter selects nothing.
        QuotaExceeded: The project has too many jobs or files.
    """
    sha256 = fingerprint(asked.model_dump(mode="json"))
    replay = find_replay(principal, ROUTE, attempted, sha256)
    if replay is not None:
        return replay
    submitted = record_attempt(principal, ROUTE, attempted, sha256)
    if submitted.job is not None:
        return replayed(submitted.job)
    settings = get_settings()
    spec = DatasetJob(
        name=asked.name,
        records=asked.records(time.time()),
        options=asked.options(),
        max_bytes=settings.max_file_bytes,
        max_row_bytes=settings.max_line_bytes,
    )

    def insert(session: Session) -> Job:
        """Inserts the job, if there is room for its files and a completion to read."""
        _demand_files(session, principal.project_id, settings)
        if not completions.has_any(
            session, principal.project_id, CompletionFilter.of(spec.records)
        ):
            raise BadRequest(
                "no stored completion matches the filter; see GET /v1/chat/completions",
                "no_matching_completions",
                "filter",
            )
        return jobs.insert_job(
            session,
            id=f"dataset-{secrets.token_hex(12)}",
            project_id=principal.project_id,
            kind="dataset",
            spec=spec.model_dump(mode="json"),
            request=asked.model_dump(mode="json"),
            job_metadata=asked.metadata or {},
            model_id=asked.name,
            request_sha256=sha256,
            created_by_key_id=principal.key_id,
        )

    return insert_once(principal, ROUTE, attempted, submitted, sha256=sha256, insert=insert)


def delete_dataset(project_id: str, dataset_id: str) -> None:
    """Deletes a data set that has ended, with its files.

    Raises NotFound, and Conflict if it has not ended or if a job reads one of its files.
    """
    with transaction() as session:
        job = get_job(session, project_id, dataset_id, "dataset")
        if jobs.delete_job(session, job.id) is None:
            raise Conflict(f"the data set is {job.status}; cancel it first, then delete it")
        keys, readers = datasets.delete_files(session, job)
        if readers:
            raise Conflict(
                f"files of the data set are in use by {', '.join(sorted(set(readers)))}",
                "resource_in_use",
                "dataset_id",
            )
    for key in keys:
        store().delete(key)


def _demand_files(session: Session, project_id: str, settings: Settings) -> None:
    num_files, num_bytes = files.count_files(session, project_id)
    if (
        num_files + len(SIDES) > settings.max_files_per_project
        or num_bytes > settings.max_bytes_per_project
    ):
        raise QuotaExceeded(
            f"the project has {num_files:,} files with {num_bytes:,} bytes and no room for a data set; delete some"
        )
