"""The supervisor's transactions, against a real Postgres, with several holders of one job."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from sqlalchemy import text

from app.contracts.messages import ImportJob, JobFailure, ModelFacts
from app.db import jobs, models
from app.db.schema.tables import Job
from app.db.session import DatabaseUnavailable, engine, transaction
from app.settings import Settings
from tests.job_rows import FACTS, SPEC, add_job, claim, ref
from tests.worker.lost_answers import LostAnswers
from worker.jobs import lease_client
from worker.jobs.lease_client import Lease, LeaseLost
from worker.protocol.run_lines import (
    MessageLine,
    MetricsLine,
    ProgressLine,
    RunLine,
    StageLine,
    StoppedLine,
)


@pytest.fixture(autouse=True)
def quick_settings(database: str, settings_env: Callable[..., Settings]) -> None:
    settings_env(database_url=database, retry_backoff_seconds=0, max_losses=3, keep_checkpoints=2)


def load(job_id: str = "ftjob-1") -> Job:
    with transaction() as session:
        job = jobs.load_job(session, job_id)
        assert job is not None
        return job


def finish(lease: Lease, model_id: str = "ds:small") -> bool:
    return lease_client.finish(
        lease,
        model_id=model_id,
        ref=ref(f"models/{lease.job_id}"),
        facts=FACTS,
        result={"kl": 0.5},
        trained_tokens=7,
    )


def wake(job_id: str = "ftjob-1") -> None:
    with transaction() as session:
        session.execute(
            text("UPDATE jobs SET status = 'queued' WHERE id = :id AND status = 'retry_wait'"),
            {"id": job_id},
        )


def test_a_claim_carries_the_spec_and_no_checkpoint_at_first() -> None:
    add_job()
    lease = claim()
    assert (lease.job_id, lease.attempt, lease.spec, lease.resume) == ("ftjob-1", 1, SPEC, None)
    assert lease_client.claim("other") is None
    job = load()
    assert (job.status, job.lease_token) == ("running", lease.token)


def test_a_job_that_this_version_cannot_read_fails_and_the_next_is_taken() -> None:
    add_job("broken", spec={"kind": "distillation", "from": "the future"})
    add_job("good")
    assert claim().job_id == "good"
    job = load("broken")
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"] == "invalid_spec"


def test_many_workers_never_claim_one_job_twice() -> None:
    for number in range(12):
        add_job(f"job-{number}")

    def drain(worker: int) -> list[str]:
        taken = []
        while lease := lease_client.claim(f"w{worker}"):
            taken.append(lease.job_id)
        return taken

    with ThreadPoolExecutor(4) as pool:
        claimed = [job_id for taken in pool.map(drain, range(4)) for job_id in taken]
    assert sorted(claimed) == sorted(f"job-{number}" for number in range(12))


def test_lines_become_stage_progress_series_and_history() -> None:
    add_job()
    lease = claim()
    lines: list[RunLine] = [
        StageLine(name="loading_models"),
        StageLine(name="training"),
        ProgressLine(percent=1.0, step=1, total_steps=10),
        ProgressLine(percent=2.0, step=2, total_steps=10, seconds_remaining=8.0),
        MetricsLine(step=1, values={"train_loss": 2.0}),
        MetricsLine(step=2, total_steps=10, values={"train_loss": 1.0, "valid_kl": float("nan")}),
        MessageLine(level="warn", message="3 answers did not end", data={"rows": 3}),
        StoppedLine(step=2),
    ]
    lease_client.record(lease, 1, lines)
    job = load()
    assert job.stage == "training"
    assert [(stage["name"], stage["status"]) for stage in job.stages] == [
        ("loading_models", "succeeded"),
        ("training", "running"),
    ]
    assert job.progress == {"percent": 2.0, "step": 2, "total_steps": 10, "seconds_remaining": 8.0}
    assert job.latest_metrics == {"step": 2, "train_loss": 1.0, "valid_kl": None}
    with transaction() as session:
        series = jobs.metric_series(session, job.id)
        events = jobs.events_since(session, job.id, 0)
    assert [(row.name, row.step, row.value) for row in series] == [
        ("train_loss", 1, 2.0),
        ("train_loss", 2, 1.0),
    ]
    assert [event.type for event in events] == [
        "message",
        "message",
        "state",
        "state",
        "stage",
        "stage",
        "metrics",
        "metrics",
        "message",
    ]
    assert events[-1].level == "warn"
    assert [event.message for event in events if event.type == "metrics"] == [
        "Step 1: training loss=2.00",
        "Step 2/10: training loss=1.00",
    ]
    assert events[-2].data == {"step": 2, "total_steps": 10, "train_loss": 1.0, "valid_kl": None}


def test_metrics_of_a_training_step_have_the_speed_of_the_last_progress() -> None:
    add_job()
    lease = claim()
    first: list[RunLine] = [
        MetricsLine(step=1, values={"train_loss": 3.0}),  # no speed is known yet
        ProgressLine(percent=1.0, step=1, tokens_per_second=50.0),
        MetricsLine(step=2, values={"train_loss": 2.0}),
        MetricsLine(step=2, values={"valid_loss": 2.5}),
    ]
    lease_client.record(lease, 1, first)
    lease_client.record(lease, 2, [MetricsLine(step=3, values={"train_loss": 1.0})])
    with transaction() as session:
        series = jobs.metric_series(session, lease.job_id, names=["tokens_per_second"])
        told = [e.data for e in jobs.events_since(session, lease.job_id, 0) if e.type == "metrics"]
    assert [(row.step, row.value) for row in series] == [(2, 50.0), (3, 50.0)]
    assert [data.get("tokens_per_second") for data in told] == [None, 50.0, None, 50.0]


def test_a_run_goes_on_from_its_newest_checkpoint_and_past_a_damaged_one() -> None:
    add_job()
    first = claim()
    lease_client.commit_checkpoint(first, 10, ref("c/10"), {"valid_kl": 1.0}, True)
    lease_client.commit_checkpoint(first, 20, ref("c/20"), {"valid_kl": 2.0}, False)
    lease_client.release(first, "The worker is drained.")
    second = claim()
    assert second.attempt == 2
    assert second.resume is not None
    assert (second.resume.step, second.resume.artifact) == (20, ref("c/20"))
    older = lease_client.mark_corrupt(second, second.resume.id)
    assert older is not None
    assert older.step == 10
    assert lease_client.mark_corrupt(second, older.id) is None


def test_checkpoints_beyond_the_newest_and_the_best_are_freed() -> None:
    add_job()
    lease = claim()
    freed = [
        lease_client.commit_checkpoint(lease, n, ref(f"c/{n}"), {}, n == 1) for n in range(1, 5)
    ]
    assert freed == [[], [], [], ["c/2"]]


def test_orders_come_with_the_heartbeat() -> None:
    add_job()
    lease = claim()
    assert lease_client.heartbeat(lease) == lease_client.JobSignals(cancel=False, pause=False)
    with transaction() as session:
        jobs.request_pause(session, lease.job_id)
    assert lease_client.heartbeat(lease) == lease_client.JobSignals(cancel=False, pause=True)
    with transaction() as session:
        jobs.request_cancel(session, lease.job_id)
    assert lease_client.heartbeat(lease) == lease_client.JobSignals(cancel=True, pause=True)
    lease_client.cancelled(lease)
    assert load().status == "cancelled"


def test_a_finished_job_has_registered_its_model() -> None:
    add_job()
    lease = claim()
    lease_client.record(lease, 1, [StageLine(name="exporting")])
    assert finish(lease)
    job = load()
    assert (job.status, job.result, job.result_model_id, job.trained_tokens) == (
        "succeeded",
        {"kl": 0.5},
        "ds:small",
        7,
    )
    assert [stage["status"] for stage in job.stages] == ["succeeded"]
    with transaction() as session:
        model = models.find_model(session, "p", "ds:small")
    assert model is not None
    assert (model.origin, model.source_job_id, model.teacher_id, model.base_id) == (
        "distilled",
        "ftjob-1",
        "big",
        "big",
    )
    assert (model.store_key, model.manifest_sha256, model.bytes) == ("models/ftjob-1", "a" * 64, 10)
    assert ModelFacts.model_validate(model.facts) == FACTS


def test_an_import_without_a_project_registers_a_shared_model() -> None:
    spec = ImportJob(output_model="base", staged=ref("imports/1"), format="folder")
    add_job(
        "import-1",
        kind="import",
        project_id=None,
        model_id="base",
        spec=spec.model_dump(mode="json"),
    )
    assert finish(claim(), "base")
    with transaction() as session:
        model = models.find_model(session, "anybody", "base")
    assert model is not None
    assert (model.origin, model.project_id, model.teacher_id, model.base_id) == (
        "imported",
        None,
        None,
        None,
    )


def test_a_taken_model_id_fails_the_job_and_leaves_the_model_alone() -> None:
    add_job()
    add_job("ftjob-2")
    first, second = claim(), claim()
    assert finish(first)
    assert not finish(second)
    job = load(second.job_id)
    assert job.error is not None
    assert (job.status, job.error["code"]) == ("failed", "model_id_taken")
    with transaction() as session:
        model = models.find_model(session, "p", "ds:small")
    assert model is not None
    assert model.source_job_id == first.job_id


def test_a_cancel_before_the_end_leaves_no_model() -> None:
    add_job()
    lease = claim()
    with transaction() as session:
        jobs.request_cancel(session, lease.job_id)
    assert not finish(lease)
    assert load().status == "cancelled"
    with transaction() as session:
        assert models.find_model(session, "p", "ds:small") is None


ENDINGS: dict[str, Callable[[Lease], object]] = {
    "finish": finish,
    "fail": lambda lease: lease_client.fail(
        lease, JobFailure(code="nan_loss", message="lower the learning rate")
    ),
    "cancelled": lease_client.cancelled,
    "paused": lease_client.paused,
    "release": lambda lease: lease_client.release(lease, "Drained."),
    "lost": lambda lease: lease_client.lost(lease, "The trainer was killed."),
}
WRITES: dict[str, Callable[[Lease], object]] = {
    **ENDINGS,
    "heartbeat": lease_client.heartbeat,
    "record": lambda lease: lease_client.record(lease, 1, [MessageLine(message="boo")]),
    "commit": lambda lease: lease_client.commit_checkpoint(lease, 1, ref("c/1"), {}, True),
    "mark_corrupt": lambda lease: lease_client.mark_corrupt(lease, "ftckpt_x"),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_ending_whose_answer_got_lost_may_be_repeated(ending: str) -> None:
    add_job()
    lease = claim()
    first = ENDINGS[ending](lease)
    status, events = load().status, count_events()
    assert ENDINGS[ending](lease) == first
    assert (load().status, count_events()) == (status, events)


@pytest.mark.parametrize("write", WRITES)
def test_a_zombie_writes_nothing_while_its_successor_runs(write: str) -> None:
    add_job()
    zombie = claim("zombie")
    lease_client.lost(zombie, "It fell silent.")
    wake()
    successor = claim("successor")
    before, events = load(), count_events()
    if write == "lost":  # its own loss is on record already: a repetition, not a write
        WRITES[write](zombie)
    else:
        with pytest.raises(LeaseLost):
            WRITES[write](zombie)
    after = load()
    assert (after.status, after.lease_token, after.num_losses) == (
        "running",
        successor.token,
        before.num_losses,
    )
    assert count_events() == events
    assert finish(successor)


@pytest.mark.parametrize("write", WRITES)
def test_a_zombie_writes_nothing_after_its_successor_has_finished(write: str) -> None:
    add_job()
    zombie = claim("zombie")
    lease_client.release(zombie, "Drained.")
    assert finish(claim("successor"))
    events = count_events()
    if write in {"release", "paused"}:
        WRITES[write](zombie)
    else:
        with pytest.raises(LeaseLost):
            WRITES[write](zombie)
    assert load().status == "succeeded"
    assert count_events() == events


def test_a_worker_that_dies_too_often_fails_the_job() -> None:
    add_job()
    for number in range(3):
        assert load().num_losses == number
        lease_client.lost(claim(), "The trainer ran out of memory.", "out_of_memory")
        wake()
    job = load()
    assert job.error is not None
    assert (job.status, job.error["code"], job.num_losses) == ("failed", "out_of_memory", 3)
    assert "The trainer ran out of memory." in job.error["message"]


def test_draining_and_pausing_count_no_loss() -> None:
    add_job()
    for _ in range(5):
        lease_client.release(claim(), "The worker is drained.")
    lease = claim()
    with transaction() as session:
        jobs.request_pause(session, lease.job_id)
    lease_client.paused(lease)
    job = load()
    assert (job.status, job.num_losses, job.attempt) == ("paused", 0, 6)


def test_a_drain_obeys_a_pause_that_was_asked_for() -> None:
    add_job()
    lease = claim()
    with transaction() as session:
        jobs.request_pause(session, lease.job_id)
    lease_client.release(lease, "The worker is drained.")
    assert load().status == "paused"


def test_cut_connections_are_survived(database: str) -> None:
    """Postgres ends every connection again and again while a worker reports; nothing it was told is lost."""
    add_job()
    lease = claim()
    stop = threading.Event()

    def cut() -> None:
        with psycopg.connect(database, autocommit=True) as connection:
            while not stop.wait(0.03):
                connection.execute(
                    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )

    thread = threading.Thread(target=cut)
    thread.start()
    accepted = set()
    try:
        for step in range(15):
            try:
                lease_client.record(
                    lease, step + 1, [MetricsLine(step=step, values={"loss": float(step)})]
                )
            except DatabaseUnavailable:
                continue
            accepted.add(step)
    finally:
        stop.set()
        thread.join()
    assert accepted
    with transaction() as session:
        assert accepted <= {row.step for row in jobs.metric_series(session, lease.job_id)}
    assert finish(lease)


@pytest.fixture
def lost_answers(database: str, settings_env: Callable[..., Settings]) -> Iterator[LostAnswers]:
    proxy = LostAnswers(database)
    settings_env(database_url=proxy.url)
    yield proxy
    settings_env(database_url=database)
    proxy.close()


def test_a_record_whose_commit_was_not_answered_is_written_once(lost_answers: LostAnswers) -> None:
    add_job()
    lease = claim()
    lines: list[RunLine] = [
        StageLine(name="loading_models"),
        StageLine(name="training"),
        MetricsLine(step=1, values={"train_loss": 2.0}),
        MessageLine(level="warn", message="3 answers did not end"),
    ]
    lease_client.record(lease, 1, [MessageLine(message="hello")])
    lost_answers.is_armed.set()
    lease_client.record(lease, 2, lines)
    lease_client.record(lease, 3, [MetricsLine(step=2, values={"train_loss": 1.0})])
    assert lost_answers.num_lost == 1
    assert [stage["name"] for stage in load().stages] == ["loading_models", "training"]
    with transaction() as session:
        events = [event.type for event in jobs.events_since(session, lease.job_id, 0)]
        series = jobs.metric_series(session, lease.job_id)
    assert events == [
        "message",
        "message",
        "state",
        "state",
        "message",
        "stage",
        "stage",
        "metrics",
        "message",
        "metrics",
    ]
    assert [(row.step, row.value) for row in series] == [(1, 2.0), (2, 1.0)]


def test_a_checkpoint_whose_commit_was_not_answered_is_committed_and_marked_once(
    lost_answers: LostAnswers,
) -> None:
    add_job()
    lease = claim()
    lost_answers.is_armed.set()
    lease_client.commit_checkpoint(lease, 1, ref("c/1"), {}, True)
    with transaction() as session:
        (checkpoint,), _ = jobs.page_checkpoints(session, lease.job_id)
    lost_answers.is_armed.set()
    assert lease_client.mark_corrupt(lease, checkpoint.id) is None
    assert lost_answers.num_lost == 2
    with transaction() as session:
        events = [event.type for event in jobs.events_since(session, lease.job_id, 0)]
    assert events == ["message", "message", "state", "state", "checkpoint", "message"]


def count_events() -> int:
    with engine().connect() as connection:
        count = connection.execute(text("SELECT count(*) FROM job_events")).scalar_one()
        assert isinstance(count, int)
        return count
