"""A lease is kept while the database answers, and given up well before another worker may take the job."""

import time
from collections.abc import Callable

import pytest

from app.contracts import ArtifactRef, ImportJob
from app.db import jobs, leases
from app.db.session import transaction
from app.settings import Settings
from worker import ledger
from worker.heart import PATIENCE, Heart
from worker.ledger import Lease

NOWHERE = "postgresql://nobody@127.0.0.1:9/none"


@pytest.fixture
def lease(database: str) -> Lease:
    spec = ImportJob(output_model="m", staged=ArtifactRef(key="imports/x", bytes=1), format="folder")
    with transaction() as session:
        jobs.insert_job(
            session,
            id="import-1",
            project_id="p",
            kind="import",
            model_id="m",
            spec=spec.model_dump(mode="json"),
        )
    claimed = ledger.claim("test")
    assert claimed is not None
    return claimed


def beating(lease: Lease, *, lease_seconds: float) -> Heart:
    return Heart(lease, claimed_at=time.monotonic(), beat_seconds=0.05, lease_seconds=lease_seconds)


def wait_until(is_true: Callable[[], bool], seconds: float = 10) -> float:
    began = time.monotonic()
    while not is_true():
        assert time.monotonic() - began < seconds, "it did not happen in time"
        time.sleep(0.01)
    return time.monotonic() - began


def test_the_lease_outlives_its_length_while_it_beats(lease: Lease) -> None:
    with beating(lease, lease_seconds=0.6) as heart:
        time.sleep(1.2)
        assert not heart.is_lost


def test_orders_come_back_with_the_beat(lease: Lease) -> None:
    with beating(lease, lease_seconds=60) as heart:
        with transaction() as session:
            jobs.request_pause(session, lease.job_id)
        wait_until(lambda: heart.orders.pause)
        with transaction() as session:
            jobs.request_cancel(session, lease.job_id)
        wait_until(lambda: heart.orders.cancel)


def test_a_refused_beat_is_the_end(lease: Lease) -> None:
    with beating(lease, lease_seconds=60) as heart:
        with transaction() as session:
            losses = leases.Losses(most=3, backoff_seconds=0)
            leases.lose(
                session, lease.job_id, lease.token, losses, reason="Reaped.", error_code="worker_lost"
            )
        wait_until(lambda: heart.is_lost)


def test_without_the_database_the_lease_is_given_up_before_it_is_over(
    lease: Lease, settings_env: Callable[..., Settings]
) -> None:
    with beating(lease, lease_seconds=2) as heart:
        settings_env(database_url=NOWHERE)
        waited = wait_until(lambda: heart.is_lost)
    assert waited <= 2 * PATIENCE + 0.2


def test_a_short_outage_costs_nothing(
    lease: Lease, database: str, settings_env: Callable[..., Settings]
) -> None:
    with beating(lease, lease_seconds=4) as heart:
        settings_env(database_url=NOWHERE)
        time.sleep(0.5)
        settings_env(database_url=database)
        time.sleep(4 * PATIENCE)
        assert not heart.is_lost
