"""Which changes of state have an event, for which endpoints, and in which transaction."""

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text

from app.contracts.messages import JobFailure
from app.db import batches, jobs, leases, reconciliation
from app.db.schema.tables import BatchStatus, Job
from app.db.session import Session, transaction
from app.db.traffic.datasets import finish_dataset
from app.db.webhooks import deliveries, endpoints
from app.db.webhooks.outbox import EVENT_TYPES

LOSSES = leases.RetryPolicy(1, 1.0)


def add_endpoint(session: Session, name: str = "we_1", **columns: Any) -> None:
    values = {
        "project_id": "p",
        "name": name,
        "url": "https://example.com/",
        "event_types": list(EVENT_TYPES),
        "secret": "whsec_AAAA",
    }
    endpoints.insert_endpoint(session, id=name, **{**values, **columns})


def events(session: Session) -> list[tuple[str, str]]:
    rows = session.execute(text("SELECT type, data->>'id' FROM webhook_events ORDER BY 1, 2"))
    return [(row[0], row[1]) for row in rows]


def receivers(session: Session) -> list[str]:
    rows = session.execute(text("SELECT endpoint_id FROM webhook_deliveries ORDER BY 1"))
    return [row[0] for row in rows]


def start(session: Session) -> int:
    job = leases.claim(session, "w", 60)
    assert job is not None
    assert job.lease_token is not None
    return job.lease_token


def model(job_id: str) -> dict[str, Any]:
    return {
        "id": f"ds:{job_id}",
        "origin": "distilled",
        "store_key": "k",
        "bytes": 1,
        "manifest_sha256": "",
        "facts": {},
    }


def succeed(session: Session) -> None:
    token = start(session)
    columns = model("ftjob-1")
    leases.succeed(session, "ftjob-1", token, model=columns, result={}, trained_tokens=1)


def fail(session: Session) -> None:
    leases.fail(session, "ftjob-1", start(session), JobFailure(code="c", message="m"))


def lose_for_the_last_time(session: Session) -> None:
    start(session)
    session.execute(text("UPDATE jobs SET lease_expires_at = now() - interval '1 s'"))
    assert reconciliation.expire_leases(session, LOSSES) == 1


def cancel_while_queued(session: Session) -> None:
    jobs.request_cancel(session, "ftjob-1")


def cancel_by_the_worker(session: Session) -> None:
    token = start(session)
    jobs.request_cancel(session, "ftjob-1")
    assert events(session) == []
    leases.release(session, "ftjob-1", token, reason="A drain.")


def cancel_by_the_reconciler(session: Session) -> None:
    start(session)
    jobs.request_cancel(session, "ftjob-1")
    session.execute(text("UPDATE jobs SET cancel_requested_at = now() - interval '1 h'"))
    assert reconciliation.finish_cancels(session, 1.0) == 1


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (succeed, "succeeded"),
        (fail, "failed"),
        (lose_for_the_last_time, "failed"),
        (cancel_while_queued, "cancelled"),
        (cancel_by_the_worker, "cancelled"),
        (cancel_by_the_reconciler, "cancelled"),
    ],
)
def test_a_job_that_ends_has_one_event(
    session: Session, add_job: Callable[..., Job], end: Callable[[Session], None], status: str
) -> None:
    add_endpoint(session)
    add_job()
    assert events(session) == []
    end(session)
    assert events(session) == [(f"fine_tuning.job.{status}", "ftjob-1")]
    assert receivers(session) == ["we_1"]


def test_a_job_that_does_not_end_has_none_and_a_resumed_one_has_two(
    session: Session, add_job: Callable[..., Job]
) -> None:
    add_endpoint(session)
    add_job()
    jobs.request_pause(session, "ftjob-1")
    jobs.resume(session, "ftjob-1")
    token = start(session)
    leases.release(session, "ftjob-1", token, reason="A drain.")
    token = start(session)
    session.execute(
        text(
            "INSERT INTO checkpoints (id, job_id, lease_token, step, store_key, bytes, manifest_sha256)"
            " VALUES ('c', 'ftjob-1', 1, 1, 'k', 1, '')"
        )
    )
    assert events(session) == []
    leases.fail(session, "ftjob-1", token, JobFailure(code="c", message="m"))
    jobs.resume(session, "ftjob-1")
    succeed(session)
    assert [kind for kind, _ in events(session)] == [
        "fine_tuning.job.failed",
        "fine_tuning.job.succeeded",
    ]


def test_imports_data_sets_and_jobs_of_no_project_have_none(
    session: Session, add_job: Callable[..., Job]
) -> None:
    add_endpoint(session)
    add_job("import-1", kind="import")
    jobs.request_cancel(session, "import-1")
    add_job("ftjob-2", project_id=None)
    jobs.request_cancel(session, "ftjob-2")
    add_job("dataset-1", kind="dataset")
    finish_dataset(session, "dataset-1", start(session), files=[], result={})
    assert jobs.status_of(session, "dataset-1") == "succeeded"
    assert events(session) == []


def add_batch(session: Session, *, errors: list[dict[str, Any]]) -> None:
    batches.insert_batch(
        session,
        id="batch_1",
        project_id="p",
        endpoint="/v1/completions",
        input_file_id="f",
        input_key="files/f",
        errors=errors,
    )


@pytest.mark.parametrize(
    "status", [BatchStatus.completed, BatchStatus.expired, BatchStatus.cancelled]
)
def test_a_batch_that_ends_has_one_event(session: Session, status: BatchStatus) -> None:
    add_endpoint(session)
    add_batch(session, errors=[])
    batch = batches.claim(session, 60)
    assert batch is not None
    assert batch.lease_token is not None
    token = batch.lease_token
    if status == BatchStatus.cancelled:
        batches.request_cancel(session, "batch_1")
    else:
        batches.begin_finalizing(session, "batch_1", token)
    assert events(session) == []
    assert not batches.finish(
        session, "batch_1", token + 1, status, output_file=None, error_file=None
    )
    assert events(session) == []
    assert batches.finish(session, "batch_1", token, status, output_file=None, error_file=None)
    assert events(session) == [(f"batch.{status}", "batch_1")]


def test_a_batch_that_fails_at_once_has_one_event(session: Session) -> None:
    add_endpoint(session)
    add_batch(session, errors=[{"code": "c", "line": 1, "message": "m", "param": None}])
    assert events(session) == [("batch.failed", "batch_1")]


def test_only_enabled_endpoints_of_the_project_that_want_the_type_get_it(
    session: Session, add_job: Callable[..., Job]
) -> None:
    add_job()
    add_job("ftjob-2")
    jobs.request_cancel(session, "ftjob-1")
    assert events(session) == []  # nobody wants it, so it is not kept
    add_endpoint(session, "we_1")
    add_endpoint(session, "we_2", event_types=["fine_tuning.job.cancelled"])
    add_endpoint(session, "we_other_type", event_types=["fine_tuning.job.failed"])
    add_endpoint(session, "we_other_project", project_id="q")
    add_endpoint(
        session,
        "we_disabled",
        disabled_at=deliveries.server_time(session),
        disabled_reason="a reason",
    )
    jobs.request_cancel(session, "ftjob-2")
    add_endpoint(session, "we_later")
    assert events(session) == [("fine_tuning.job.cancelled", "ftjob-2")]
    assert receivers(session) == ["we_1", "we_2"]


class Interrupted(Exception):
    """What ends the transaction of a test."""


def test_a_transaction_that_is_rolled_back_sends_nothing(
    session: Session, add_job: Callable[..., Job]
) -> None:
    add_endpoint(session)
    add_job()
    session.commit()

    def cancel_in_vain() -> None:
        with transaction() as other:
            jobs.request_cancel(other, "ftjob-1")
            assert len(events(other)) == 1
            raise Interrupted

    with pytest.raises(Interrupted):
        cancel_in_vain()
    with transaction() as other:
        assert events(other) == []
        soon = deliveries.server_time(other) + timedelta(hours=1)
        assert deliveries.claim(other, soon, lease_seconds=60, most=9) == []
        assert jobs.status_of(other, "ftjob-1") == "queued"


def test_a_job_can_end_while_its_endpoint_is_being_deleted(
    session: Session, add_job: Callable[..., Job]
) -> None:
    """The deletion is committed while the transaction of the job waits for it."""
    add_endpoint(session)
    add_job()
    session.commit()
    ended = threading.Event()

    def end_job() -> None:
        with transaction() as other:
            jobs.request_cancel(other, "ftjob-1")
        ended.set()

    with transaction() as deleter:
        assert endpoints.delete_endpoint(deleter, "p", "we_1")
        thread = threading.Thread(target=end_job)
        thread.start()
        waiting = text(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        while thread.is_alive():
            with transaction() as observer:
                if observer.scalar(waiting):
                    break
    thread.join()
    assert ended.is_set()
    with transaction() as other:
        assert jobs.status_of(other, "ftjob-1") == "cancelled"
        assert events(other) == []


def test_old_events_are_deleted_with_their_deliveries(
    session: Session, add_job: Callable[..., Job]
) -> None:
    add_endpoint(session)
    for number in range(3):
        add_job(f"ftjob-{number}")
        jobs.request_cancel(session, f"ftjob-{number}")
    session.execute(
        text(
            "UPDATE webhook_events SET created_at = now() - interval '2 days' "
            "WHERE data->>'id' != 'ftjob-1'"
        )
    )
    assert deliveries.forget_old_events(session, 86_400.0, most=1) == 1
    assert deliveries.forget_old_events(session, 86_400.0, most=9) == 1
    assert [job_id for _, job_id in events(session)] == ["ftjob-1"]
    assert len(receivers(session)) == 1
