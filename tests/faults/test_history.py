"""The checker of the faults sees an event of any type that is there twice or not at all."""

from collections.abc import Callable

import psycopg
import pytest
from psycopg.rows import dict_row

from app.db import jobs
from app.db.session import transaction
from app.settings import Settings
from tests.faults.checker import histories
from tests.faults.history import History
from tests.job_rows import FACTS, add_job, claim, ref
from worker.jobs import lease_client
from worker.jobs.lease_client import Lease
from worker.protocol.run_lines import MessageLine, MetricsLine, StageLine

JOB = "ftjob-1"


def train(lease: Lease, first_step: int) -> None:
    """Two steps and a checkpoint, as a run reports them."""
    if lease.resume is not None:
        message = f"The run resumes from the checkpoint at step {lease.resume.step}."
        lease_client.record(
            lease, 1, [MessageLine(message=message, data={"step": lease.resume.step})]
        )
    lease_client.record(lease, 2, [StageLine(name="loading_models"), StageLine(name="training")])
    for step in (first_step, first_step + 1):
        lease_client.record(
            lease, 2 + step, [MetricsLine(step=step, values={"train_loss": 1.0 / step})]
        )
    lease_client.commit_checkpoint(
        lease, first_step + 1, ref(f"c/{lease.token}/{first_step + 1}"), {}, True
    )


@pytest.fixture
def job(database: str, settings_env: Callable[..., Settings]) -> str:
    """URL of a database with a job that lost its worker, was paused, resumed and has succeeded."""
    settings_env(database_url=database, retry_backoff_seconds=0)
    add_job()
    first = claim()
    train(first, 1)
    lease_client.lost(first, "It died.")
    with psycopg.connect(database) as connection:
        connection.execute("UPDATE jobs SET run_after = now()")
    with transaction() as session:
        jobs.request_pause(session, JOB)
        jobs.resume(session, JOB)
    second = claim()
    train(second, 3)
    assert lease_client.finish(
        second, model_id="ds:small", ref=ref("models/j/2"), facts=FACTS, result={}, trained_tokens=1
    )
    return database


def judged(url: str) -> History:
    with psycopg.connect(url, row_factory=dict_row) as connection:
        (history,) = histories(connection, [JOB])
    history.judge()
    return history


def test_a_history_with_faults_that_were_survived_is_sound(job: str) -> None:
    history = judged(job)
    assert (history.lost, history.duplicated) == ([], [])


COPY = (
    "INSERT INTO job_events (id, job_id, level, type, message, data) SELECT 'copy', job_id, level, type, message, "
    "data FROM job_events WHERE type = %s ORDER BY seq DESC LIMIT 1"
)


@pytest.mark.parametrize("kind", ["state", "stage", "metrics", "checkpoint", "message"])
def test_an_event_that_is_there_twice_is_found(job: str, kind: str) -> None:
    with psycopg.connect(job, autocommit=True) as connection:
        connection.execute(COPY, (kind,))
    assert judged(job).duplicated


@pytest.mark.parametrize("kind", ["state", "stage", "metrics", "checkpoint", "message"])
def test_an_event_that_is_missing_is_found(job: str, kind: str) -> None:
    history = judged(job)
    last = next(event for event in reversed(history.events) if event["type"] == kind)
    history.events.remove(last)
    history.judge()
    assert history.lost


def test_a_step_without_metrics_is_found(job: str) -> None:
    history = judged(job)
    history.metrics = [row for row in history.metrics if row["step"] != 3]
    history.events = [e for e in history.events if e["type"] != "metrics" or e["data"]["step"] != 3]
    history.judge()
    assert [wrong for wrong in history.lost if "gaps" in wrong]
