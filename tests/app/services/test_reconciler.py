"""The reconciler against a real Postgres and a real store, with a clock of its own."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from app.db import jobs, leases, reconciliation
from app.db.schema.tables import Job
from app.db.session import DatabaseUnavailable, transaction
from app.services import garbage_collector
from app.services.reconciler import Reconciler, Report
from app.settings import Settings
from app.storage import Store

LEASE_SECONDS = 60.0  # by the database's clock; tests move what the rows say instead of waiting


class Clock:
    """A monotonic clock that a test sets forward."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Notifier:
    def __init__(self) -> None:
        self.num_notified = 0

    def __call__(self) -> None:
        self.num_notified += 1


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def notifier() -> Notifier:
    return Notifier()


@pytest.fixture(autouse=True)
def quick_settings(
    database: str, settings_env: Callable[..., Settings], postgres_url: str
) -> Callable[..., Settings]:
    settings_env(
        lease_seconds=LEASE_SECONDS, max_losses=2, retry_backoff_seconds=30, heartbeat_seconds=5
    )
    return settings_env


@pytest.fixture
def reconciler(
    clock: Clock, notifier: Notifier, quick_settings: Callable[..., Settings]
) -> Reconciler:
    """One that has been connected for longer than a lease, to a server that is old enough."""
    quick_settings(lease_seconds=0.01)
    one = Reconciler(notifier, clock=clock)
    for _ in range(3):
        one.step()
        clock.now += 0.004
    return one


def add_job(job_id: str = "ftjob-1", **columns: Any) -> None:  # Any: columns of Job
    values = {"project_id": "p", "kind": "distillation", "spec": {}, "model_id": f"ds:{job_id}"}
    with transaction() as session:
        jobs.insert_job(session, id=job_id, **{**values, **columns})


def claim(lease_seconds: float = LEASE_SECONDS) -> tuple[str, int]:
    with transaction() as session:
        job = leases.claim(session, f"w{time.monotonic_ns()}", lease_seconds)
        assert job is not None
        assert job.lease_token is not None
        return job.id, job.lease_token


def load(job_id: str = "ftjob-1") -> Job:
    with transaction() as session:
        job = jobs.load_job(session, job_id)
        assert job is not None
        return job


def change(statement: str) -> None:
    with transaction() as session:
        session.execute(text(statement))


def test_a_job_that_nobody_took_is_announced_again_but_not_at_once(
    reconciler: Reconciler, notifier: Notifier
) -> None:
    add_job()
    assert reconciler.step().num_notified == 1
    assert reconciler.step().num_notified == 0
    change("UPDATE jobs SET last_rung_at = now() - interval '31 s'")
    assert reconciler.step().num_notified == 1
    assert notifier.num_notified == 2


def test_a_job_that_waits_long_is_announced_more_and_more_seldom(reconciler: Reconciler) -> None:
    add_job()
    change(
        "UPDATE jobs SET run_after = now() - interval '200 s', last_rung_at = now() - interval '90 s'"
    )
    assert reconciler.step().num_notified == 0
    change(
        "UPDATE jobs SET run_after = now() - interval '1 day', last_rung_at = now() - interval '301 s'"
    )
    assert reconciler.step().num_notified == 1


def test_jobs_that_are_not_due_are_not_announced(reconciler: Reconciler) -> None:
    add_job("later")
    add_job("paused")
    change("UPDATE jobs SET run_after = now() + interval '1 h' WHERE id = 'later'")
    with transaction() as session:
        jobs.request_pause(session, "paused")
    assert reconciler.step().num_notified == 0


def test_a_worker_that_falls_silent_loses_its_job(reconciler: Reconciler) -> None:
    add_job()
    _, token = claim(lease_seconds=-1)
    assert reconciler.step().num_lost == 1
    job = load()
    assert (job.status, job.num_losses, job.lease_token) == ("retry_wait", 1, None)
    with transaction() as session:
        assert leases.heartbeat(session, job.id, token, 60) is None


def test_a_worker_that_renews_its_lease_keeps_its_job(reconciler: Reconciler) -> None:
    add_job()
    claim()
    assert reconciler.step().num_lost == 0
    assert load().status == "running"


def test_a_lost_job_waits_is_queued_and_fails_in_the_end(
    reconciler: Reconciler, notifier: Notifier
) -> None:
    add_job()
    claim(lease_seconds=-1)
    reconciler.step()
    assert reconciler.step().num_woken == 0
    change("UPDATE jobs SET run_after = now() - interval '1 s'")
    report = reconciler.step()
    assert (report.num_woken, report.num_notified, notifier.num_notified) == (1, 1, 1)
    claim(lease_seconds=-1)
    reconciler.step()
    job = load()
    assert job.error is not None
    assert (job.status, job.error["code"]) == ("failed", "worker_lost")


def test_nothing_is_reaped_before_every_worker_had_a_lease_of_time(
    clock: Clock, notifier: Notifier, quick_settings: Callable[..., Settings], service_dir: Path
) -> None:
    """A reconciler that has just connected cannot tell a dead worker from one that could not connect either."""
    quick_settings(lease_seconds=0.01)  # the server is older than that
    add_job()
    claim(lease_seconds=-1)
    one = Reconciler(notifier, clock=clock)
    assert one.step().num_lost == 0
    clock.now += 0.004
    assert one.step().num_lost == 0
    clock.now += 0.004
    assert one.step().num_lost == 0
    clock.now += 0.004
    assert one.step().num_lost == 1


def test_nothing_is_reaped_after_a_gap_in_which_no_worker_could_renew(
    clock: Clock, notifier: Notifier, quick_settings: Callable[..., Settings]
) -> None:
    quick_settings(lease_seconds=0.01)
    one = Reconciler(notifier, clock=clock)
    for _ in range(4):
        one.step()
        clock.now += 0.004
    add_job()
    claim(lease_seconds=-1)
    clock.now += 3600  # the server was stopped, or we were
    assert one.step().num_lost == 0
    for _ in range(3):
        clock.now += 0.004
        report = one.step()
    assert report.num_lost == 1


def test_a_long_round_of_deleting_is_no_gap(
    clock: Clock,
    notifier: Notifier,
    quick_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a store whose rounds take longer than half a lease would end the reaping for good."""

    def collect_slowly(store: Store) -> int:
        clock.now += 3600
        return garbage_collector.collect(store)

    monkeypatch.setattr("app.services.reconciler.collect", collect_slowly)
    quick_settings(lease_seconds=0.01)
    add_job()
    claim(lease_seconds=-1)
    one = Reconciler(notifier, clock=clock)
    assert one.step().num_lost == 0
    clock.now += 0.004
    assert one.step().num_lost == 1


def test_a_young_server_reaps_nothing(
    reconciler: Reconciler, quick_settings: Callable[..., Settings]
) -> None:
    quick_settings(lease_seconds=10**9)
    add_job()
    claim(lease_seconds=-1)
    assert reconciler.step().num_lost == 0


def test_an_outage_is_told_and_counts_as_cut_off(
    database: str, clock: Clock, notifier: Notifier, quick_settings: Callable[..., Settings]
) -> None:
    quick_settings(lease_seconds=0.01)
    one = Reconciler(notifier, clock=clock)
    for _ in range(4):
        one.step()
        clock.now += 0.004
    add_job()
    claim(lease_seconds=-1)
    quick_settings(database_url="postgresql://postgres@127.0.0.1:9/none")
    with pytest.raises(DatabaseUnavailable):
        one.step()
    quick_settings(database_url=database)
    clock.now += 0.004
    assert one.step().num_lost == 0


def test_only_one_process_reconciles_at_a_time(reconciler: Reconciler) -> None:
    add_job()
    with transaction() as session:
        assert reconciliation.try_lead(session)
        thread_report: list[Report] = []
        thread = threading.Thread(target=lambda: thread_report.append(reconciler.step()))
        thread.start()
        thread.join(20)
        assert thread_report == [Report()]
    assert reconciler.step().is_leader


def test_a_cancel_that_no_worker_obeys_is_done_all_the_same(reconciler: Reconciler) -> None:
    add_job()
    _, token = claim()
    with transaction() as session:
        jobs.request_cancel(session, "ftjob-1")
    assert reconciler.step().num_cancelled == 0
    change("UPDATE jobs SET cancel_requested_at = now() - interval '11 s'")
    assert reconciler.step().num_cancelled == 1
    assert load().status == "cancelled"
    with transaction() as session:
        assert leases.heartbeat(session, "ftjob-1", token, 60) is None


def test_a_job_that_runs_too_long_in_all_is_asked_to_pause_and_goes_on_with_as_much_time_again(
    reconciler: Reconciler, quick_settings: Callable[..., Settings]
) -> None:
    quick_settings(max_runtime_seconds=100)
    add_job("overdue")
    claim()
    change("UPDATE job_attempts SET started_at = now() - interval '60 s'")
    with transaction() as session:
        job = jobs.load_job(session, "overdue")
        assert job is not None
        assert job.lease_token is not None
        leases.release(session, "overdue", job.lease_token, reason="Drained.")
    claim()
    assert reconciler.step().num_overdue == 0
    change("UPDATE job_attempts SET started_at = now() - interval '60 s' WHERE attempt = 2")
    assert [reconciler.step().num_overdue for _ in range(2)] == [1, 0]
    job = load("overdue")
    assert (job.status, job.error) == ("running", None)
    assert job.pause_requested_at is not None
    with transaction() as session:
        assert job.lease_token is not None
        leases.pause(session, "overdue", job.lease_token)
        events = jobs.events_since(session, "overdue", 0)
    assert load("overdue").status == "paused"
    assert events[-1].level == "warn"
    for words in (
        "more than 100 s",
        "checkpoints are kept",
        "POST /v1/fine_tuning/jobs/overdue/resume",
    ):
        assert words in events[-1].message
    with transaction() as session:
        jobs.resume(session, "overdue")
    claim()
    assert reconciler.step().num_overdue == 0
    change("UPDATE jobs SET resumed_at = now() - interval '101 s'")
    change("UPDATE job_attempts SET started_at = now() - interval '101 s' WHERE attempt = 3")
    assert reconciler.step().num_overdue == 1


def test_a_pause_for_the_time_limit_that_is_taken_back_gives_as_much_time_again(
    reconciler: Reconciler, quick_settings: Callable[..., Settings]
) -> None:
    quick_settings(max_runtime_seconds=100)
    add_job()
    claim()
    change("UPDATE job_attempts SET started_at = now() - interval '101 s'")
    assert reconciler.step().num_overdue == 1
    with transaction() as session:
        jobs.resume(session, "ftjob-1")
    assert reconciler.step().num_overdue == 0
    job = load()
    assert (job.status, job.pause_requested_at, job.pause_reason) == ("running", None, None)


def test_an_overdue_job_whose_worker_does_not_stop_is_paused_all_the_same(
    reconciler: Reconciler, quick_settings: Callable[..., Settings]
) -> None:
    quick_settings(max_runtime_seconds=100)
    add_job()
    job_id, token = claim()
    change("UPDATE job_attempts SET started_at = now() - interval '101 s'")
    reconciler.step()
    change("UPDATE jobs SET pause_requested_at = now() - interval '601 s'")
    assert reconciler.step().num_overdue == 1
    job = load()
    assert (job.status, job.num_losses) == ("paused", 0)
    assert job.pause_reason is not None
    with transaction() as session:
        assert leases.heartbeat(session, job_id, token, 60) is None


def test_an_import_that_runs_too_long_fails(
    reconciler: Reconciler, quick_settings: Callable[..., Settings]
) -> None:
    quick_settings(max_runtime_seconds=100)
    add_job(kind="import")
    claim()
    change("UPDATE job_attempts SET started_at = now() - interval '101 s'")
    assert reconciler.step().num_overdue == 1
    error = load().error
    assert error is not None
    assert error["code"] == "max_runtime_exceeded"


def test_a_second_pass_finds_nothing_to_do(reconciler: Reconciler) -> None:
    for number in range(3):
        add_job(f"job-{number}")
        claim(lease_seconds=-1)
    assert reconciler.step().num_lost == 3
    assert reconciler.step() == Report(is_leader=True)
