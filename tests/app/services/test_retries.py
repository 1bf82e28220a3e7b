"""Retries of a client that sends no idempotency key, against a real Postgres."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text

from app.auth import Principal
from app.contracts.messages import JobFailure
from app.db import jobs, leases, submissions
from app.db.locks import lock_project
from app.db.schema.tables import Job
from app.db.session import Session, transaction
from app.errors import Conflict
from app.schemas.models import ImportModel
from app.services import retries
from app.services.jobs import IMPORTS_ROUTE, create_import
from app.services.retries import RetryInfo, find_created, record_attempt, remember_job
from app.settings import Settings

ALICE = Principal("p", "alice", frozenset({"admin"}))
ROUTE, SHA = "POST /v1/fine_tuning/jobs", "a" * 64
FIRST, RETRY, SECOND_RETRY = RetryInfo(), RetryInfo(retry_count=1), RetryInfo(retry_count=2)
pytestmark = pytest.mark.usefixtures("database")


def add_job(session: Session, job_id: str) -> Job:
    values = {"project_id": "p", "kind": "distillation", "spec": {}, "model_id": f"ds:{job_id}"}
    return jobs.insert_job(session, id=job_id, **values)


def submit(job_id: str, attempted: RetryInfo, principal: Principal = ALICE) -> str:
    """The part of a submission that concerns retries; returns the id of the job that is its answer."""
    submitted = record_attempt(principal, ROUTE, attempted, SHA)
    return submitted.job.id if submitted.job else insert(submitted, job_id)


def insert(submitted: retries.Submitted, job_id: str) -> str:
    with transaction() as session:
        lock_project(session, ALICE.project_id)
        if (created := find_created(session, submitted)) is not None:
            return created.id
        remember_job(session, submitted, add_job(session, job_id))
        return job_id


def cancel(job_id: str) -> None:
    with transaction() as session:
        jobs.request_cancel(session, job_id)


def fail(job_id: str) -> None:
    with transaction() as session:
        job = leases.claim(session, "worker", 60.0)
        assert job is not None
        leases.fail(session, job_id, job.lease_token, JobFailure(code="x", message="y"))


def age(seconds: float) -> None:
    """Makes all attempts older."""
    with transaction() as session:
        moved = (
            "UPDATE submissions SET attempted_at = attempted_at - :seconds * interval '1 second'"
        )
        session.execute(text(moved), {"seconds": seconds})


def test_a_retry_gets_the_job_of_its_first_attempt() -> None:
    assert [submit("a", FIRST), submit("b", RETRY), submit("c", SECOND_RETRY)] == ["a", "a", "a"]


def test_two_first_attempts_are_two_submissions_and_each_retry_gets_its_own() -> None:
    assert [submit("a", FIRST), submit("b", FIRST)] == ["a", "b"]
    assert {submit("c", RETRY), submit("d", RETRY)} == {"a", "b"}


def test_a_retry_whose_first_attempt_waited_for_the_whole_timeout_gets_its_job() -> None:
    submit("a", FIRST)
    age(601)
    assert submit("b", RETRY) == "a"
    patient = RetryInfo(retry_count=3, timeout_seconds=3600)
    age(5000)
    assert submit("c", patient) == "a"


def test_a_retry_cannot_repeat_what_is_longer_ago_than_the_client_waits() -> None:
    submit("a", FIRST)
    age(100)
    assert submit("b", RetryInfo(retry_count=1, timeout_seconds=20)) == "a"
    age(200)
    assert submit("c", RetryInfo(retry_count=2, timeout_seconds=20)) == "c"


@pytest.mark.parametrize("end", [cancel, fail])
def test_a_retry_does_not_get_a_job_that_had_ended_without_a_result(
    end: Callable[[str], None],
) -> None:
    submit("a", FIRST)
    end("a")
    assert submit("b", RETRY) == "b"
    assert submit("c", SECOND_RETRY) == "b"


def test_a_retry_does_not_get_a_running_job_that_is_being_cancelled() -> None:
    submit("a", FIRST)
    with transaction() as session:
        leases.claim(session, "worker", 60.0)
    cancel("a")
    assert submit("b", RETRY) == "b"


def test_a_retry_gets_no_job_of_an_earlier_submission_if_its_own_first_attempt_was_refused() -> (
    None
):
    submit("a", FIRST)
    record_attempt(ALICE, ROUTE, FIRST, SHA)  # arrived, and was answered by 503
    assert submit("b", RETRY) == "b"


def test_a_retry_gets_no_job_of_another_key() -> None:
    submit("a", FIRST)
    assert submit("b", RETRY, Principal("p", "bob", frozenset({"admin"}))) == "b"


def test_a_retry_overtakes_its_first_attempt_and_they_make_one_job() -> None:
    slow = record_attempt(ALICE, ROUTE, FIRST, SHA)
    assert submit("b", RETRY) == "b"
    assert insert(slow, "a") == "b"


def test_a_retry_waits_for_a_first_attempt_that_is_inserting_its_job() -> None:
    first = record_attempt(ALICE, ROUTE, FIRST, SHA)
    is_waiting = threading.Event()

    def retry() -> str:
        is_waiting.set()
        return submit("b", RETRY)

    with ThreadPoolExecutor(1) as pool:
        with transaction() as session:
            lock_project(session, ALICE.project_id)
            answer = pool.submit(retry)
            is_waiting.wait()
            remember_job(session, first, add_job(session, "a"))
        assert answer.result(10) == "a"


def test_a_retried_import_is_not_refused_for_its_own_name(
    valkey: str, settings_env: Callable[..., Settings]
) -> None:
    asked = ImportModel(source="hf:a/b", name="brought")
    first = create_import(ALICE, asked, FIRST)
    again = create_import(ALICE, asked, RETRY)
    assert (again.body["id"], again.is_replay) == (first.body["id"], True)
    with pytest.raises(Conflict):
        create_import(ALICE, asked, FIRST)


def test_a_submission_is_forgotten_after_a_day_and_one_without_a_job_after_an_hour() -> None:
    submit("a", FIRST)
    record_attempt(ALICE, IMPORTS_ROUTE, FIRST, SHA)
    for seconds, num_left in ((3000, 2), (4000, 1), (80_000, 0)):
        age(seconds)
        with transaction() as session:
            submissions.forget_old(session)
            assert session.scalar(text("SELECT count(*) FROM submissions")) == num_left
