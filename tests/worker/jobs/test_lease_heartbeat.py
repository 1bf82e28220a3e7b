"""A lease is kept while the database answers and through its outages, and given up when it is refused."""

import time
from collections.abc import Callable

import pytest
from sqlalchemy import text

from app.contracts.messages import ArtifactRef, ImportJob
from app.db import jobs, leases
from app.db.session import transaction
from app.settings import Settings
from tests.waiting import wait_for
from worker.jobs import lease_client
from worker.jobs.lease_client import Lease
from worker.jobs.lease_heartbeat import LeaseHeartbeat

NOWHERE = "postgresql://nobody@127.0.0.1:9/none"


@pytest.fixture
def lease(database: str) -> Lease:
    spec = ImportJob(
        output_model="m", staged=ArtifactRef(key="imports/x", bytes=1), format="folder"
    )
    with transaction() as session:
        jobs.insert_job(
            session,
            id="import-1",
            project_id="p",
            kind="import",
            model_id="m",
            spec=spec.model_dump(mode="json"),
        )
    claimed = lease_client.claim("test")
    assert claimed is not None
    return claimed


def beating(lease: Lease, *, outage_seconds: float = 60) -> LeaseHeartbeat:
    return LeaseHeartbeat(lease, beat_seconds=0.05, outage_seconds=outage_seconds)


def let_run_out() -> None:
    with transaction() as session:
        session.execute(text("UPDATE jobs SET lease_expires_at = now() - interval '1 min'"))


def test_the_lease_outlives_its_length_while_it_beats(lease: Lease) -> None:
    with beating(lease, outage_seconds=0.6) as lease_heartbeat:
        time.sleep(1.2)
        assert not lease_heartbeat.is_lost


def test_orders_come_back_with_the_beat(lease: Lease) -> None:
    with beating(lease) as lease_heartbeat:
        with transaction() as session:
            jobs.request_pause(session, lease.job_id)
        wait_for(lambda: lease_heartbeat.orders.pause)
        with transaction() as session:
            jobs.request_cancel(session, lease.job_id)
        wait_for(lambda: lease_heartbeat.orders.cancel)


def test_a_refused_beat_is_the_end(lease: Lease) -> None:
    with beating(lease) as lease_heartbeat:
        with transaction() as session:
            retry_policy = leases.RetryPolicy(max_losses=3, backoff_seconds=0)
            leases.lose(
                session,
                lease.job_id,
                lease.token,
                retry_policy,
                reason="Expired.",
                error_code="worker_lost",
            )
        wait_for(lambda: lease_heartbeat.is_lost)


def test_a_database_that_is_away_for_too_long_ends_the_run(
    lease: Lease, settings_env: Callable[..., Settings]
) -> None:
    with beating(lease, outage_seconds=1) as lease_heartbeat:
        settings_env(database_url=NOWHERE)
        assert not lease_heartbeat.is_lost
        wait_for(lambda: lease_heartbeat.is_lost)


def test_an_outage_longer_than_the_lease_costs_nothing_while_nobody_has_taken_the_job(
    lease: Lease, database: str, settings_env: Callable[..., Settings]
) -> None:
    let_run_out()
    with beating(lease) as lease_heartbeat:
        settings_env(database_url=NOWHERE)
        time.sleep(0.5)
        settings_env(database_url=database)
        wait_for(lambda: not is_over())
        assert not lease_heartbeat.is_lost


def test_a_beat_that_breaks_is_not_the_last(lease: Lease) -> None:
    with beating(lease) as lease_heartbeat:
        rename("jobs", "away")
        time.sleep(0.3)
        rename("away", "jobs")
        let_run_out()
        wait_for(lambda: not is_over())
        assert not lease_heartbeat.is_lost


def rename(table: str, to: str) -> None:
    with transaction() as session:
        session.execute(text(f"ALTER TABLE {table} RENAME TO {to}"))


def is_over() -> bool:
    with transaction() as session:
        return bool(session.scalar(text("SELECT lease_expires_at < now() FROM jobs")))
