"""Reads what finished jobs needed, from their results."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.contracts.messages import JobStatus
from app.db.conditions import IS_IN_QUEUE
from app.db.schema.tables import Job

NEWEST_JOBS = 200  # jobs that are searched for results


@dataclass(frozen=True)
class JobCost:
    """Measured cost of a finished job.

    kind: Method and start of the student, see `kind_of`.
    device: "cpu" or "cuda".
    seconds, reference_seconds: Time of each phase, and that on the reference machine.
    teacher, answer_tokens: The teacher, and the mean length of its answers if it gave any.
    """

    kind: str
    version: int
    seconds: Mapping[str, float]
    reference_seconds: Mapping[str, float]
    has_bfloat16: bool
    device: str
    teacher: str
    answer_tokens: float | None


def kind_of(method: str, init: str) -> str:
    """Returns the kind of a job, such as "distillation layers"."""
    return f"{method} {init}"


def newest_costs(session: Session, project_id: str) -> list[JobCost]:
    """Returns the costs of the project's jobs that have succeeded lately, the newest first.

    Jobs with a quantised teacher are left out, because the reference times do not cover them.
    """
    newest = (
        select(Job.status, Job.attempt, Job.spec, Job.result, Job.started_at, Job.finished_at)
        .where(Job.project_id == project_id, Job.kind == "distillation", Job.deleted_at.is_(None))
        .order_by(Job.created_at.desc(), Job.id.desc())
        .limit(NEWEST_JOBS)
        .subquery()
    )
    cost = newest.c.result["cost"]
    query = select(
        newest.c.spec["method"].astext,
        newest.c.spec["distillation"]["student"]["init"].astext,
        newest.c.spec["distillation"]["teacher"].astext,
        cost,
        newest.c.result["teacher"]["answer_tokens"],
        func.extract("epoch", newest.c.finished_at - newest.c.started_at),
    ).where(
        newest.c.status == JobStatus.succeeded,
        newest.c.attempt == 1,
        newest.c.spec["distillation"]["teacher_precision"].astext.is_(None),
        cost["seconds"].is_not(None),
    )
    return [_cost(*row) for row in session.execute(query)]


def _cost(
    method: str, init: str, teacher: str, cost: Any, answer_tokens: Any, seconds: Any
) -> JobCost:  # Any: JSON values
    spent = {name: float(value) for name, value in cost["seconds"].items()}
    # The time of the worker before and after the run belongs to the first phase.
    spent["start"] = spent.get("start", 0.0) + max(0.0, float(seconds) - sum(spent.values()))
    return JobCost(
        kind=kind_of(method, init),
        version=int(cost.get("version", 0)),
        seconds=spent,
        reference_seconds={name: float(value) for name, value in cost["reference_seconds"].items()},
        has_bfloat16=bool(cost.get("has_bfloat16")),
        device=str(cost.get("device")),
        teacher=teacher,
        answer_tokens=float(answer_tokens) if isinstance(answer_tokens, int | float) else None,
    )


def count_waiting(session: Session) -> int:
    """Returns the number of jobs of all projects that wait for a worker."""
    return session.scalar(select(func.count()).select_from(Job).where(IS_IN_QUEUE)) or 0
