"""Random histories of jobs against a real Postgres and a plain model of the rules, checked after every step."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import psycopg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from psycopg.rows import dict_row

from app.contracts.messages import JobFailure
from app.db import jobs, leases, reconciliation
from app.db.session import transaction
from app.settings import Settings
from tests.job_rows import FACTS, SPEC, add_job, ref
from worker.jobs import lease_client
from worker.jobs.lease_client import Lease, LeaseLost
from worker.protocol.run_lines import MetricsLine

MOST_LOSSES = 5
MOST_JOBS = 3  # that have not ended: few, so that many leases meet on one
PICKS = st.integers(0, 59)
TERMINAL = {"succeeded", "failed", "cancelled"}


@dataclass
class Expected:
    """What the rules say of one job."""

    status: str = "queued"
    token: int | None = None
    num_losses: int = 0
    is_cancelling: bool = False
    is_pausing: bool = False
    has_checkpoint: bool = False
    num_failures: int = 0
    num_records: int = 0
    outcomes: dict[int, str] = field(default_factory=dict)

    def end(self, status: str, outcome: str | None = None) -> None:
        assert self.token is not None
        self.outcomes[self.token] = outcome or status
        self.num_failures += status == "failed"
        self.status, self.token = status, None

    def lose(self) -> None:
        self.num_losses += 1
        if self.is_cancelling:
            self.num_losses -= 1  # no loss is counted where nothing is tried again
            self.end("cancelled", "lost")
        elif self.is_pausing:
            self.rest()
        elif self.num_losses >= MOST_LOSSES:
            self.end("failed", "lost")
        else:
            self.end("retry_wait", "lost")

    def rest(self) -> None:
        self.is_pausing = False
        self.end("paused")

    def release(self) -> None:
        if self.is_cancelling:
            self.end("cancelled")
        elif self.is_pausing:
            self.rest()
        else:
            self.end("queued", "released")


has_jobs = precondition(lambda machine: machine.expected)
has_leases = precondition(lambda machine: machine.given)


class Lifecycle(RuleBasedStateMachine):
    """Every rule may come at any time, with any lease that was ever given out."""

    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.expected: dict[str, Expected] = {}
        self.ended: dict[str, dict[str, Any]] = {}  # Any: the row as it was when the job ended
        self.given: list[Lease] = []

    @initialize()
    def begin_empty(self) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute("TRUNCATE jobs, models, checkpoints, files CASCADE")

    @precondition(lambda self: len(self.open_jobs()) < MOST_JOBS)
    @rule()
    def submit(self) -> None:
        job_id = f"ftjob-{len(self.expected)}"
        output_model = f"ds:{job_id}"
        spec = SPEC.model_copy(update={"output_model": output_model})
        add_job(job_id, model_id=output_model, spec=spec.model_dump(mode="json"))
        self.expected[job_id] = Expected()

    @rule()
    def claim(self) -> None:
        """A wake-up message, or one more delivery of it."""
        lease = lease_client.claim("worker")
        waiting = [job_id for job_id, job in self.expected.items() if job.status == "queued"]
        if lease is None:
            assert waiting == []
            return
        assert lease.job_id in waiting
        assert all(lease.token > other.token for other in self.given)
        self.given.append(lease)
        self.expected[lease.job_id].status = "running"
        self.expected[lease.job_id].token = lease.token

    @has_jobs
    @rule(pick=PICKS)
    def claim_whose_answer_was_lost(self, pick: int) -> None:
        job_id = self.pick_job(pick)
        with transaction() as session:
            job = jobs.load_job(session, job_id)
            assert job is not None
            if job.lease_owner is not None:
                again = leases.claim(session, job.lease_owner, 90)
                assert again is not None
                assert (again.id, again.lease_token) == (job.id, job.lease_token)

    @has_leases
    @rule(pick=PICKS)
    def beat(self, pick: int) -> None:
        lease = self.pick_lease(pick)
        job = self.expected[lease.job_id]
        if self.is_live(lease):
            orders = lease_client.heartbeat(lease)
            assert (orders.cancel, orders.pause) == (job.is_cancelling, job.is_pausing)
        else:
            self.refused(lambda: lease_client.heartbeat(lease))

    @has_leases
    @rule(pick=PICKS, step=st.integers(1, 4))
    def write(self, pick: int, step: int) -> None:
        lease = self.pick_lease(pick)

        def record() -> None:
            self.expected[lease.job_id].num_records += 1
            number = self.expected[lease.job_id].num_records
            lease_client.record(
                lease, number, [MetricsLine(step=step, values={"loss": float(lease.token)})]
            )

        record() if self.is_live(lease) else self.refused(record)

    @has_leases
    @rule(pick=PICKS, step=st.integers(1, 4), is_best=st.booleans())
    def commit(self, pick: int, step: int, is_best: bool) -> None:
        lease = self.pick_lease(pick)

        def commit() -> None:
            key = f"checkpoints/{lease.job_id}/{lease.token}/step-{step}"
            lease_client.commit_checkpoint(lease, step, ref(key), {}, is_best)

        if self.is_live(lease):
            commit()
            self.expected[lease.job_id].has_checkpoint = True
        else:
            self.refused(commit)

    @has_leases
    @rule(pick=PICKS)
    def finish(self, pick: int) -> None:
        lease = self.pick_lease(pick)
        job = self.expected[lease.job_id]

        def finish() -> bool:
            key = f"models/{lease.job_id}/{lease.token}"
            return lease_client.finish(
                lease,
                model_id=f"ds:{lease.job_id}",
                ref=ref(key),
                facts=FACTS,
                result={},
                trained_tokens=1,
            )

        if self.is_live(lease):
            assert finish() is not job.is_cancelling
            job.end("cancelled" if job.is_cancelling else "succeeded")
        elif job.outcomes[lease.token] == "succeeded":
            assert finish()
        else:
            self.refused(finish)

    @has_leases
    @rule(pick=PICKS)
    def fail(self, pick: int) -> None:
        lease = self.pick_lease(pick)

        def fail() -> None:
            lease_client.fail(
                lease, JobFailure(code="nan_loss", message="the loss is not a number")
            )

        self.ending(lease, fail, lambda job: job.end("failed"), "failed")

    @has_leases
    @rule(pick=PICKS)
    def lose(self, pick: int) -> None:
        lease = self.pick_lease(pick)
        said = {"lost", "out_of_memory", "paused", "cancelled"}
        self.ending(lease, lambda: lease_client.lost(lease, "It died."), Expected.lose, *said)

    @has_leases
    @rule(pick=PICKS)
    def release(self, pick: int) -> None:
        lease = self.pick_lease(pick)
        said = {"released", "paused", "cancelled"}
        self.ending(lease, lambda: lease_client.release(lease, "Drained."), Expected.release, *said)

    @has_leases
    @rule(pick=PICKS)
    def stop_for_pause(self, pick: int) -> None:
        lease = self.pick_lease(pick)
        said = {"released", "paused", "cancelled"}
        self.ending(lease, lambda: lease_client.paused(lease), Expected.release, *said)

    @has_leases
    @rule(pick=PICKS)
    def stop_for_cancel(self, pick: int) -> None:
        lease = self.pick_lease(pick)
        self.ending(
            lease,
            lambda: lease_client.cancelled(lease),
            lambda job: job.end("cancelled"),
            "cancelled",
        )

    @has_jobs
    @rule(pick=PICKS)
    def ask_to_cancel(self, pick: int) -> None:
        job_id = self.pick_job(pick)
        job = self.expected[job_id]
        with transaction() as session:
            found = jobs.request_cancel(session, job_id)
        assert (found is None) == (job.status in {"succeeded", "failed"})
        if job.status == "running":
            job.is_cancelling = True
        elif job.status not in TERMINAL:
            job.status = "cancelled"

    @has_jobs
    @rule(pick=PICKS)
    def ask_to_pause(self, pick: int) -> None:
        job_id = self.pick_job(pick)
        job = self.expected[job_id]
        with transaction() as session:
            found = jobs.request_pause(session, job_id)
        may_pause = job.status not in TERMINAL and not job.is_cancelling
        assert (found is not None) == may_pause
        if may_pause and job.status == "running":
            job.is_pausing = True
        elif may_pause:
            job.status = "paused"

    @has_jobs
    @rule(pick=PICKS)
    def resume(self, pick: int) -> None:
        job_id = self.pick_job(pick)
        job = self.expected[job_id]
        with transaction() as session:
            found = jobs.resume(session, job_id)
        can_be_resumed = (
            job.status == "paused"
            or (job.status == "running" and job.is_pausing)
            or (job.status == "failed" and job.has_checkpoint)
        )
        assert (found is not None) == can_be_resumed
        if not can_be_resumed:
            return
        job.num_losses = 0
        if job.status == "running":
            job.is_pausing = False
        else:
            self.ended.pop(job_id, None)
            job.status, job.is_cancelling, job.is_pausing = "queued", False, False

    @has_jobs
    @rule(pick=PICKS)
    def let_the_lease_run_out_and_reap(self, pick: int) -> None:
        """A zombie is made: its lease stays among the held ones."""
        job_id = self.pick_job(pick)
        self.expire_leases(job_id)

    @has_jobs
    @rule(pick=PICKS)
    def hand_over(self, pick: int) -> None:
        """The same, and a successor takes the job at once: two workers now believe that it is theirs."""
        self.expire_leases(self.pick_job(pick))
        self.wake()
        self.claim()

    @rule()
    def wake_up(self) -> None:
        self.wake()

    def expire_leases(self, job_id: str) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(
                "UPDATE jobs SET lease_expires_at = now() - interval '1 s' WHERE id = %s AND status = 'running'",
                (job_id,),
            )
        with transaction() as session:
            num_lost = reconciliation.expire_leases(session, leases.RetryPolicy(MOST_LOSSES, 0.0))
        job = self.expected[job_id]
        assert num_lost == (job.status == "running")
        if job.status == "running":
            job.lose()

    def wake(self) -> None:
        with transaction() as session:
            reconciliation.wake(session)
        for job in self.expected.values():
            if job.status == "retry_wait":
                job.status = "queued"

    @rule()
    def give_up_on_cancels(self) -> None:
        with transaction() as session:
            reconciliation.finish_cancels(session, 0.0)
        for job in self.expected.values():
            if job.is_cancelling and job.status == "running":
                job.end("cancelled")

    @invariant()
    def the_database_is_as_the_rules_say(self) -> None:
        with psycopg.connect(self.url, row_factory=dict_row) as connection:
            rows = {row["id"]: row for row in connection.execute("SELECT * FROM jobs")}
            attempts = connection.execute(
                "SELECT * FROM job_attempts ORDER BY job_id, attempt"
            ).fetchall()
            models = connection.execute("SELECT source_job_id, store_key FROM models").fetchall()
            ends = connection.execute(
                "SELECT job_id FROM job_events WHERE type = 'state' AND data->>'status' = ANY(%s)",
                (list(TERMINAL),),
            ).fetchall()
        assert set(rows) == set(self.expected)
        for job_id, job in self.expected.items():
            row = rows[job_id]
            assert (row["status"], row["lease_token"]) == (job.status, job.token)
            assert row["num_losses"] == job.num_losses
            mine = [attempt for attempt in attempts if attempt["job_id"] == job_id]
            tokens = [attempt["lease_token"] for attempt in mine]
            assert tokens == sorted(set(tokens))
            live = [attempt["lease_token"] for attempt in mine if attempt["ended_at"] is None]
            assert live == ([] if job.token is None else [job.token])
            assert {a["lease_token"]: a["outcome"] for a in mine if a["ended_at"]} == job.outcomes
            registered = [
                model["store_key"] for model in models if model["source_job_id"] == job_id
            ]
            assert registered == (
                [f"models/{job_id}/{tokens[-1]}"] if job.status == "succeeded" else []
            )
            is_final = job.status in {"succeeded", "cancelled"}
            assert sum(end["job_id"] == job_id for end in ends) == job.num_failures + is_final
            if job.status in TERMINAL:
                assert self.ended.setdefault(job_id, row) == row

    def open_jobs(self) -> list[str]:
        return [job_id for job_id, job in self.expected.items() if job.status not in TERMINAL]

    def pick_job(self, pick: int) -> str:
        """Mostly one that has not ended."""
        known = self.open_jobs() if pick % 5 else []
        return (known or list(self.expected))[pick % len(known or self.expected)]

    def pick_lease(self, pick: int) -> Lease:
        """Mostly one of a job that has not ended, and the older ones too."""
        known = (
            [lease for lease in self.given if lease.job_id in self.open_jobs()] if pick % 5 else []
        )
        return (known or self.given)[pick % len(known or self.given)]

    def is_live(self, lease: Lease) -> bool:
        return self.expected[lease.job_id].token == lease.token

    def refused(self, call: Callable[[], object]) -> None:
        with pytest.raises(LeaseLost):
            call()

    def ending(
        self, lease: Lease, call: Callable[[], None], apply: Callable[[Expected], None], *said: str
    ) -> None:
        """An ending by its holder counts; said again it is recognised; by anybody else it is refused."""
        job = self.expected[lease.job_id]
        if self.is_live(lease):
            call()
            apply(job)
        elif job.outcomes[lease.token] in said:
            call()
        else:
            self.refused(call)


def test_no_history_breaks_the_rules(database: str, settings_env: Callable[..., Settings]) -> None:
    settings_env(
        database_url=database, retry_backoff_seconds=0, max_losses=MOST_LOSSES, keep_checkpoints=2
    )
    machine = type("OfThisDatabase", (Lifecycle,), {"url": database})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=20,
            stateful_step_count=50,
            deadline=None,
            derandomize=True,
            database=None,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        ),
    )
