"""Plans of frequent queries: what they read does not grow with the jobs that have ended."""

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import event, text

from app.contracts.messages import JobStatus
from app.db import batches, files, health_checks, jobs, leases, models, reconciliation
from app.db.schema.tables import Model
from app.db.session import Session, engine, transaction

FEW, MANY = 1_000, 20_000
SPARE_BUFFERS = (
    12  # one more level of each index, and pages that other tests' settings leave half full
)
LOSSES = leases.RetryPolicy(3, 1.0)

ADD_ENDED_JOBS = """
INSERT INTO jobs (id, project_id, kind, status, spec, model_id, request_sha256, training_file_id,
                  created_at, finished_at, error, cancel_requested_at)
SELECT 'ftjob-' || n, 'p', CASE WHEN n % 50 = 0 THEN 'import' ELSE 'distillation' END, status,
       '{"teacher": {"key": "models/a"}, "start": {"key": "models/a"}}', 'ds:' || n, 'same', 'file-1',
       now() - (1000000 - n) * interval '1 second', now(),
       CASE WHEN status = 'failed' THEN '{}'::jsonb END, CASE WHEN status = 'cancelled' THEN now() END
FROM (SELECT n, (ARRAY['succeeded', 'failed', 'cancelled'])[1 + n % 3] AS status
      FROM generate_series(CAST(:first AS int), CAST(:last AS int)) AS n) AS numbered
"""
ADD_ENDED_BATCHES = """
INSERT INTO batches (id, project_id, endpoint, status, input_file_id, input_key, expires_at)
SELECT 'batch-' || n, 'p', 'e', 'completed', 'file-1', 'files/1', now()
FROM generate_series(CAST(:first AS int), CAST(:last AS int)) AS n
"""
ADD_FILES = """
INSERT INTO files (id, project_id, filename, purpose, bytes, sha256, store_key)
SELECT 'file-' || n, 'q', 'f', 'fine-tune', 1, '', 'files/' || n
FROM generate_series(CAST(:first AS int), CAST(:last AS int)) AS n
"""
ADD_KEYS = """
INSERT INTO idempotency_keys (project_id, key, route, request_sha256, expires_at)
SELECT 'p', 'key-' || n, 'r', '', now() + interval '1 day'
FROM generate_series(CAST(:first AS int), CAST(:last AS int)) AS n
"""
TABLES = ("jobs", "batches", "files", "idempotency_keys", "job_counts")


def add_history(first: int, last: int) -> None:
    with transaction() as session:
        for statement in (ADD_ENDED_JOBS, ADD_ENDED_BATCHES, ADD_FILES, ADD_KEYS):
            session.execute(text(statement), {"first": first, "last": last})
    with transaction() as session:
        jobs.fold_counts(session)
    with engine().connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for table in TABLES:
            connection.execute(text(f"VACUUM (ANALYZE) {table}"))
        # So many changes at once, as no minute of a service brings, leave empty pages.
        connection.execute(text("VACUUM (FULL) job_counts"))


def base_model() -> Model:
    return Model(id="base", project_id="p", store_key="models/base", source_job_id=None)


def queue_position(session: Session) -> object:
    job = jobs.load_job(session, "ftjob-waiting")
    assert job is not None
    return jobs.queue_position(session, job)


QUERIES: dict[str, Callable[[Session], object]] = {
    "count_active": lambda session: jobs.count_active(session, "p"),
    "count_by_status": jobs.count_by_status,
    "queue_position": queue_position,
    "queue_age_seconds": health_checks.queue_age_seconds,
    "trainer_speeds": health_checks.trainer_speeds,
    "page_jobs": lambda session: jobs.page_jobs(session, "p", kind="distillation"),
    "is_name_taken": lambda session: models.is_name_taken(session, "ds:7"),
    "find_checkpoint": lambda session: models.find_checkpoint(session, "p", "ds:7", 1),
    "users_of_model": lambda session: models.users_of_model(session, base_model()),
    "readers_of_file": lambda session: files.readers_of_file(session, "p", "file-1"),
    "count_active_batches": lambda session: batches.count_active(session, "p"),
    "claim": lambda session: leases.claim(session, "owner", 60.0),
    "mark_due_notified": lambda session: reconciliation.mark_due_notified(session, 30.0, 8),
    "expire_leases": lambda session: reconciliation.expire_leases(session, LOSSES),
    "finish_cancels": lambda session: reconciliation.finish_cancels(session, 1.0),
    "wake": reconciliation.wake,
    "forget_expired_files": reconciliation.forget_expired_files,
    "forget_expired_keys": reconciliation.forget_expired_keys,
    "unknown_files": lambda session: reconciliation.unknown_files(
        session, ["files/1", "files/none"]
    ),
}


@pytest.fixture
def history(database: str) -> None:
    """A waiting job, and few jobs, batches, files and idempotency keys that have ended or still lie there."""
    with transaction() as session:
        values = {"project_id": "p", "kind": "distillation", "spec": {}, "model_id": "ds:waiting"}
        jobs.insert_job(session, id="ftjob-waiting", **values)
    add_history(1, FEW)


def explained(
    query: Callable[[Session], object],
) -> list[tuple[str, dict[str, Any]]]:  # Any: a plan, as JSON
    """Each statement of the query with its plan, in a transaction that is rolled back."""
    statements: list[tuple[str, Any]] = []  # Any: parameters as the driver takes them

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.lstrip().upper().startswith(("SELECT", "UPDATE", "DELETE", "WITH")):
            statements.append((statement, parameters))

    plans = []
    with engine().connect() as connection:
        session = Session(connection)
        event.listen(connection, "before_cursor_execute", note)
        query(session)
        session.rollback()
        event.remove(connection, "before_cursor_execute", note)
        for statement, parameters in statements:
            asked = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}"
            # what it reads for the first time is catalogue
            connection.exec_driver_sql(asked, parameters)
            (answer,) = connection.exec_driver_sql(asked, parameters).scalars()
            plans.append((statement, answer[0]["Plan"]))
            connection.rollback()
    assert plans
    return plans


def num_buffers(plan: dict[str, Any]) -> int:  # Any: a plan, as JSON
    return int(plan["Shared Hit Blocks"]) + int(plan["Shared Read Blocks"])


def test_what_a_frequent_query_reads_does_not_grow_with_history(history: None) -> None:
    before = {
        name: sum(num_buffers(plan) for _, plan in explained(query))
        for name, query in QUERIES.items()
    }
    add_history(FEW + 1, MANY)
    after = {
        name: sum(num_buffers(plan) for _, plan in explained(query))
        for name, query in QUERIES.items()
    }
    grown = {
        name: (before[name], after[name])
        for name in QUERIES
        if after[name] > before[name] + SPARE_BUFFERS
    }
    assert grown == {}


def test_counts_by_status_follow_every_change(database: str) -> None:
    with transaction() as session:
        for n in range(3):
            values = {"project_id": "p", "kind": "distillation", "spec": {}, "model_id": f"ds:{n}"}
            jobs.insert_job(session, id=f"ftjob-{n}", **values)
    with transaction() as session:
        jobs.request_cancel(session, "ftjob-0")
        jobs.request_pause(session, "ftjob-1")
        session.execute(text("DELETE FROM jobs WHERE id = 'ftjob-2'"))
    expected = {status.value: 0 for status in JobStatus} | {"cancelled": 1, "paused": 1}
    for _ in range(2):  # before and after the changes are summed up
        with transaction() as session:
            assert jobs.count_by_status(session) == expected
            jobs.fold_counts(session)
    with transaction() as session:
        assert session.scalar(text("SELECT count(*) FROM job_counts")) == 2
