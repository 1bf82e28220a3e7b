import time
from collections.abc import Callable
from datetime import timedelta
from itertools import product
from typing import Any

import pytest
from sqlalchemy import func, text
from sqlalchemy.exc import DatabaseError

from app.contracts.messages import TERMINAL, ArtifactRef, JobFailure, JobStatus
from app.db import checkpoints, jobs, leases
from app.db.job_states import LEGAL, add_event, move, sources_of
from app.db.schema.tables import Checkpoint, Job
from app.db.session import Session

AddJob = Callable[..., Job]


def held(job: Job | None) -> tuple[str, int]:
    assert job is not None
    assert job.lease_token is not None
    return job.id, job.lease_token


def put_into(session: Session, job: Job, status: JobStatus) -> None:
    """Walks a queued job into a state by legal moves."""
    if status == JobStatus.queued:
        return
    if status in {JobStatus.paused, JobStatus.cancelled}:
        assert move(session, job.id, status, message="go")
        return
    job_id, token = held(leases.claim(session, "w", 60))
    if status == JobStatus.failed:
        assert leases.fail(session, job_id, token, JobFailure(code="nan_loss", message="no"))
    elif status != JobStatus.running:
        assert move(session, job_id, status, message="go", token=token)


@pytest.mark.parametrize(("source", "target"), list(product(JobStatus, JobStatus)))
def test_only_legal_moves_are_made(
    session: Session, add_job: AddJob, source: JobStatus, target: JobStatus
) -> None:
    put_into(session, job := add_job(), source)
    columns: dict[str, Any] = {}  # Any: columns of Job
    if target == JobStatus.failed:
        columns = {"error": {"code": "x", "message": "y"}}
    if target == JobStatus.running:
        columns = {"lease_token": 99, "lease_expires_at": func.now()}
    events = len(jobs.events_since(session, job.id, 0))
    moved = move(session, job.id, target, message="go", **columns)
    assert (moved is not None) == (target in LEGAL[source])
    assert jobs.status_of(session, job.id) == (target if moved else source)
    assert len(jobs.events_since(session, job.id, 0)) == events + (moved is not None)


def test_of_the_states_that_have_ended_only_a_failure_is_left_and_only_for_the_queue() -> None:
    assert {status: LEGAL[status] for status in TERMINAL} == {
        JobStatus.succeeded: frozenset(),
        JobStatus.cancelled: frozenset(),
        JobStatus.failed: frozenset({JobStatus.queued}),
    }
    assert [status for status in JobStatus if sources_of(status) & TERMINAL] == [JobStatus.queued]


def test_claims_take_the_oldest_due_job_and_never_one_twice(
    session: Session, add_job: AddJob
) -> None:
    add_job("later", run_after=func.now() + timedelta(hours=1))
    add_job("second", run_after=func.now() - timedelta(seconds=1))
    add_job("first", run_after=func.now() - timedelta(seconds=2))
    claimed = [leases.claim(session, f"w{n}", 60) for n in range(3)]
    assert [job.id for job in claimed if job] == ["first", "second"]


def test_the_same_claim_again_gives_the_same_job(session: Session, add_job: AddJob) -> None:
    add_job("one")
    add_job("two")
    first, again = leases.claim(session, "w/1", 60), leases.claim(session, "w/1", 60)
    assert held(first) == held(again)
    assert held(leases.claim(session, "w/2", 60)) != held(first)


def test_lease_tokens_rise(session: Session, add_job: AddJob) -> None:
    add_job()
    tokens: list[int] = []
    for _ in range(3):
        job_id, token = held(leases.claim(session, f"w{len(tokens)}", 60))
        tokens.append(token)
        assert leases.release(session, job_id, token, reason="Drained.")
    assert tokens == sorted(set(tokens))


def test_a_stale_token_writes_nothing(session: Session, add_job: AddJob) -> None:
    add_job()
    job_id, old = held(leases.claim(session, "zombie", 60))
    assert leases.lose(
        session, job_id, old, leases.RetryPolicy(3, 0.0), reason="Silent.", error_code="worker_lost"
    )
    assert move(session, job_id, JobStatus.queued, message="again")
    _, new = held(leases.claim(session, "successor", 60))
    before = jobs.load_job(session, job_id)
    assert before is not None
    events = len(jobs.events_since(session, job_id, 0))
    ref = ArtifactRef(key="k", bytes=1, sha256="0" * 64)
    model = {
        "id": "m",
        "origin": "distilled",
        "store_key": "k",
        "bytes": 1,
        "manifest_sha256": "",
        "facts": {},
    }
    refused = [
        leases.heartbeat(session, job_id, old, 60),
        leases.write_progress(session, job_id, old, progress={"percent": 1}),
        checkpoints.insert_checkpoint(
            session, job_id, old, step=1, ref=ref, metrics={}, is_best=True
        ),
        checkpoints.mark_corrupt(session, job_id, old, "x"),
        leases.succeed(session, job_id, old, model=model, result={}, trained_tokens=1),
        leases.fail(session, job_id, old, JobFailure(code="x", message="y")),
        leases.lose(
            session, job_id, old, leases.RetryPolicy(1, 0.0), reason="", error_code="worker_lost"
        ),
        leases.cancel(session, job_id, old),
        leases.pause(session, job_id, old),
        leases.release(session, job_id, old, reason=""),
    ]
    assert not any(refused)
    session.expire_all()
    after = jobs.load_job(session, job_id)
    assert after is not None
    assert (after.status, after.lease_token, after.progress, after.num_losses) == (
        "running",
        new,
        {},
        1,
    )
    assert len(jobs.events_since(session, job_id, 0)) == events


def test_cancelling_ends_a_waiting_job_and_asks_a_running_one(
    session: Session, add_job: AddJob
) -> None:
    add_job("waiting", run_after=func.now() + timedelta(hours=1))
    add_job("running")
    job_id, token = held(leases.claim(session, "w", 60))
    waiting, running = (
        jobs.request_cancel(session, "waiting"),
        jobs.request_cancel(session, "running"),
    )
    assert waiting is not None
    assert running is not None
    assert (waiting.status, running.status) == ("cancelled", "running")
    assert jobs.request_cancel(session, "waiting") is not None
    assert jobs.request_cancel(session, "running") is not None
    assert jobs.request_pause(session, "running") is None
    renewed = leases.heartbeat(session, job_id, token, 60)
    assert renewed is not None
    assert renewed.cancel_requested_at is not None


@pytest.mark.parametrize("status", [JobStatus.succeeded, JobStatus.failed])
def test_a_job_that_has_ended_cannot_be_stopped(
    session: Session, add_job: AddJob, status: JobStatus
) -> None:
    put_into(session, job := add_job(), status)
    assert jobs.request_cancel(session, job.id) is None
    assert jobs.request_pause(session, job.id) is None
    assert jobs.resume(session, job.id) is None


def test_pausing_and_resuming_a_waiting_job(session: Session, add_job: AddJob) -> None:
    job = add_job()
    assert jobs.resume(session, job.id) is None
    for _ in range(2):
        paused = jobs.request_pause(session, job.id)
        assert paused is not None
        assert paused.status == "paused"
    assert leases.claim(session, "w", 60) is None
    resumed = jobs.resume(session, job.id)
    assert resumed is not None
    assert resumed.status == "queued"
    assert held(leases.claim(session, "w", 60))


def test_a_failed_job_keeps_its_checkpoints_and_its_error_says_how_to_go_on(
    session: Session, add_job: AddJob
) -> None:
    add_job()
    job_id, token = held(leases.claim(session, "w", 60))
    for step in (1, 2):
        commit(session, job_id, token, step, is_best=step == 1)
    failed = leases.fail(
        session, job_id, token, JobFailure(code="out_of_memory", message="use less memory")
    )
    assert failed is not None
    assert failed.error is not None
    assert failed.error["message"].startswith("use less memory. The checkpoint at step 2 is kept")
    assert f"POST /v1/fine_tuning/jobs/{job_id}/resume" in failed.error["message"]
    assert len(jobs.page_checkpoints(session, job_id)[0]) == 2


def test_a_resumed_failure_counts_its_losses_anew(session: Session, add_job: AddJob) -> None:
    add_job()
    retry_policy = leases.RetryPolicy(1, 0.0)
    job_id, token = held(leases.claim(session, "w", 60))
    commit(session, job_id, token, 1)
    jobs.request_cancel(session, job_id)
    assert leases.fail(session, job_id, token, JobFailure(code="x", message="y"))
    for _ in range(2):
        resumed = jobs.resume(session, job_id)
        assert resumed is not None
        assert (resumed.status, resumed.error, resumed.finished_at, resumed.num_losses) == (
            "queued",
            None,
            None,
            0,
        )
        assert resumed.cancel_requested_at is None
        job_id, token = held(leases.claim(session, f"w{time.monotonic_ns()}", 60))
        lost = leases.lose(
            session, job_id, token, retry_policy, reason="Silent.", error_code="worker_lost"
        )
        assert lost is not None
        assert (lost.status, lost.num_losses) == ("failed", 1)


def test_a_job_that_failed_before_its_first_checkpoint_cannot_be_resumed(
    session: Session, add_job: AddJob
) -> None:
    put_into(session, job := add_job(), JobStatus.failed)
    assert jobs.resume(session, job.id) is None


def test_a_worker_that_is_lost_on_the_way_to_a_pause_fails_nothing(
    session: Session, add_job: AddJob
) -> None:
    add_job()
    job_id, token = held(leases.claim(session, "w", 60))
    jobs.request_pause(session, job_id, reason="it has run for too long.")
    after = leases.lose(
        session,
        job_id,
        token,
        leases.RetryPolicy(1, 0.0),
        reason="It died.",
        error_code="worker_lost",
    )
    assert after is not None
    assert (after.status, after.pause_reason) == ("paused", "it has run for too long.")
    last = jobs.events_since(session, job_id, 0)[-1]
    assert (last.level, last.message) == (
        "warn",
        "It died. The job is paused: it has run for too long.",
    )


def test_a_pause_that_was_taken_back_queues_the_job_again(
    session: Session, add_job: AddJob
) -> None:
    add_job()
    job_id, token = held(leases.claim(session, "w", 60))
    assert jobs.request_pause(session, job_id)
    assert jobs.resume(session, job_id)
    after = leases.pause(session, job_id, token)
    assert after is not None
    assert after.status == "queued"


def test_a_running_job_pauses_when_its_worker_says_so(session: Session, add_job: AddJob) -> None:
    add_job()
    job_id, token = held(leases.claim(session, "w", 60))
    assert jobs.request_pause(session, job_id)
    after = leases.pause(session, job_id, token)
    assert after is not None
    assert (after.status, after.pause_requested_at, after.num_losses) == ("paused", None, 0)


def test_a_cancel_that_comes_before_the_end_wins(session: Session, add_job: AddJob) -> None:
    add_job()
    job_id, token = held(leases.claim(session, "w", 60))
    jobs.request_cancel(session, job_id)
    model = {
        "id": "m",
        "origin": "distilled",
        "store_key": "k",
        "bytes": 1,
        "manifest_sha256": "",
        "facts": {},
    }
    after = leases.succeed(session, job_id, token, model=model, result={}, trained_tokens=1)
    assert after is not None
    assert (after.status, after.result_model_id) == ("cancelled", None)


def test_losses_wait_longer_each_time_and_then_fail_the_job(
    session: Session, add_job: AddJob
) -> None:
    job = add_job()
    waits: list[int] = []
    for _ in range(3):
        job_id, token = held(leases.claim(session, f"w{len(waits)}", 60))
        after = leases.lose(
            session,
            job_id,
            token,
            leases.RetryPolicy(3, 8.0),
            reason="It died.",
            error_code="worker_lost",
        )
        assert after is not None
        waits.append(round((after.run_after - session.scalars(func.now()).one()).total_seconds()))
        if after.status == "retry_wait":
            move(session, job_id, JobStatus.queued, message="again", run_after=func.now())
    assert waits[:2] == [8, 16]
    session.expire_all()
    assert (job.status, job.num_losses, job.attempt) == ("failed", 3, 3)
    assert job.error is not None
    assert job.error["code"] == "worker_lost"
    outcomes = session.execute(
        text("SELECT outcome, ended_at FROM job_attempts ORDER BY attempt")
    ).all()
    assert [row.outcome for row in outcomes] == ["lost", "lost", "lost"]
    assert all(row.ended_at for row in outcomes)


def test_the_queue_position_counts_those_ahead(session: Session, add_job: AddJob) -> None:
    rows = [add_job(f"job-{n}", run_after=func.now() - timedelta(seconds=10 - n)) for n in range(3)]
    assert [jobs.queue_position(session, row) for row in rows] == [(1, 3), (2, 3), (3, 3)]
    leases.claim(session, "w", 60)
    session.expire_all()
    assert [jobs.queue_position(session, row) for row in rows] == [None, (1, 2), (2, 2)]


def test_pages_meet_without_gap_or_overlap(session: Session, add_job: AddJob) -> None:
    made = {add_job(f"job-{n}").id for n in range(7)}
    add_job("foreign", project_id="other")
    for order in ("asc", "desc"):
        seen: list[str] = []
        has_more = True
        while has_more:
            after = seen[-1] if seen else None
            rows, has_more = jobs.page_jobs(session, "p", after=after, limit=3, order=order)
            seen += [row.id for row in rows]
        assert sorted(seen) == sorted(made)
    with pytest.raises(jobs.UnknownCursor):
        jobs.page_jobs(session, "p", after="foreign")


def test_jobs_are_found_by_all_of_the_metadata_asked_for(session: Session, add_job: AddJob) -> None:
    add_job("a", job_metadata={"team": "x", "run": "1"})
    add_job("b", job_metadata={"team": "x", "run": "2"})
    found, _ = jobs.page_jobs(session, "p", metadata={"team": "x", "run": "2"})
    assert [row.id for row in found] == ["b"]
    assert len(jobs.page_jobs(session, "p", metadata={"team": "x"})[0]) == 2


def test_another_projects_job_is_not_found(session: Session, add_job: AddJob) -> None:
    job = add_job()
    assert jobs.find_job(session, "p", job.id) is job
    assert jobs.find_job(session, "other", job.id) is None


def test_events_are_paged_and_followed_by_their_order(session: Session, add_job: AddJob) -> None:
    job = add_job()
    for number in range(5):
        add_event(session, job.id, f"event {number}")
    newest, has_more = jobs.page_events(session, job.id, limit=2)
    assert [event.message for event in newest] == ["event 4", "event 3"]
    assert has_more
    older, _ = jobs.page_events(session, job.id, after=newest[-1].id, limit=2)
    assert [event.message for event in older] == ["event 2", "event 1"]
    since = jobs.events_since(session, job.id, older[-1].seq)
    assert [event.message for event in since] == ["event 2", "event 3", "event 4"]
    with pytest.raises(jobs.UnknownCursor):
        jobs.page_events(session, job.id, after="ftevent-unknown")


def test_history_cannot_be_rewritten(session: Session, add_job: AddJob) -> None:
    add_job()
    for statement in ("UPDATE job_events SET message = 'x'", "DELETE FROM job_events"):
        with pytest.raises(DatabaseError, match="append-only"), session.begin_nested():
            session.execute(text(statement))
    session.execute(text("DELETE FROM jobs"))
    assert session.execute(text("SELECT count(*) FROM job_events")).scalar() == 0


def test_what_json_cannot_hold_is_replaced(session: Session, add_job: AddJob) -> None:
    add_job()
    job_id, token = held(leases.claim(session, "w", 60))
    dirty = {"loss": float("nan"), "text": "a\0b\ud800", "list": [float("inf"), 1.5]}
    job = leases.write_progress(session, job_id, token, latest_metrics=dirty)
    event = add_event(session, job_id, "nul \0 " + "x" * 5000, data=dirty)
    assert job is not None
    clean = {"loss": None, "text": "a\ufffdb\ufffd", "list": [None, 1.5]}
    session.refresh(event)
    assert job.latest_metrics == event.data == clean
    assert len(event.message) == 4000


def test_repeated_steps_replace_their_metrics(session: Session, add_job: AddJob) -> None:
    job = add_job()
    leases.write_metrics(session, job.id, 1, {"loss": 3.0, "kl": 2.0})
    leases.write_metrics(session, job.id, 2, {"loss": 2.0, "bad": float("nan")})
    leases.write_metrics(session, job.id, 1, {"loss": 2.5})
    rows = jobs.metric_series(session, job.id)
    assert [(row.name, row.step, row.value) for row in rows] == [
        ("kl", 1, 2.0),
        ("loss", 1, 2.5),
        ("loss", 2, 2.0),
    ]
    rows = jobs.metric_series(session, job.id, names=["loss"], from_step=2, to_step=2)
    assert [(row.name, row.step) for row in rows] == [("loss", 2)]


def commit(
    session: Session, job_id: str, token: int, step: int, *, is_best: bool = False
) -> list[str]:
    ref = ArtifactRef(key=f"checkpoints/{job_id}/{token}/step-{step}", bytes=1, sha256="0" * 64)
    assert checkpoints.insert_checkpoint(
        session, job_id, token, step=step, ref=ref, metrics={}, is_best=is_best
    )
    return checkpoints.retire_checkpoints(session, job_id, 2)


def test_the_best_and_the_newest_checkpoints_stay(session: Session, add_job: AddJob) -> None:
    add_job()
    job_id, token = held(leases.claim(session, "w", 60))
    freed = [commit(session, job_id, token, step, is_best=step in {1, 4}) for step in range(1, 6)]
    assert [sorted(key.rpartition("-")[2] for key in keys) for keys in freed] == [
        [],
        [],
        [],
        ["1", "2"],
        ["3"],
    ]
    usable, _ = jobs.page_checkpoints(session, job_id)
    assert {(row.step, row.is_best) for row in usable} == {(4, True), (5, False)}


def test_committing_a_checkpoint_twice_changes_nothing(session: Session, add_job: AddJob) -> None:
    add_job()
    job_id, token = held(leases.claim(session, "w", 60))
    commit(session, job_id, token, 1)
    events = len(jobs.events_since(session, job_id, 0))
    commit(session, job_id, token, 1)
    assert len(jobs.page_checkpoints(session, job_id)[0]) == 1
    assert len(jobs.events_since(session, job_id, 0)) == events


def test_a_damaged_checkpoint_is_passed_over(session: Session, add_job: AddJob) -> None:
    add_job()
    job_id, token = held(leases.claim(session, "w", 60))
    commit(session, job_id, token, 1)
    commit(session, job_id, token, 2)
    newest = leases.newest_checkpoint(session, job_id)
    assert newest is not None
    assert checkpoints.mark_corrupt(session, job_id, token, newest.id)
    older = leases.newest_checkpoint(session, job_id)
    assert isinstance(older, Checkpoint)
    assert older.step == 1
    warnings = [
        event.level for event in jobs.events_since(session, job_id, 0) if "damaged" in event.message
    ]
    assert warnings == ["warn"]
    assert checkpoints.mark_corrupt(session, job_id, token, newest.id)
    assert (
        len([event for event in jobs.events_since(session, job_id, 0) if event.level == "warn"])
        == 1
    )
