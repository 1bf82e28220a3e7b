"""Writes to the checkpoints of a job by the worker that holds its lease.

A function that returns False has changed nothing, because the worker has lost the lease.
"""

from sqlalchemy import select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.contracts.messages import ArtifactRef
from app.db.job_states import add_event
from app.db.leases import hold
from app.db.schema.ids import new_id
from app.db.schema.json_values import clean
from app.db.schema.table import Json
from app.db.schema.tables import Checkpoint


def insert_checkpoint(
    session: Session,
    job_id: str,
    token: int,
    *,
    step: int,
    ref: ArtifactRef,
    metrics: Json,
    is_best: bool,
) -> bool:
    """Commits a checkpoint and records an event. Repeating the call changes nothing.

    If `is_best`, no other checkpoint of the job stays marked as the best.
    """
    if hold(session, job_id, token) is None:
        return False
    fresh = insert(Checkpoint).values(
        id=new_id("ftckpt_"),
        job_id=job_id,
        lease_token=token,
        step=step,
        store_key=ref.key,
        bytes=ref.bytes,
        manifest_sha256=ref.sha256,
        metrics=clean(metrics),
        is_best=is_best,
    )
    checkpoint_id = session.scalar(fresh.on_conflict_do_nothing().returning(Checkpoint.id))
    if checkpoint_id is None:
        return True
    if is_best:
        others = update(Checkpoint).where(
            Checkpoint.job_id == job_id, Checkpoint.id != checkpoint_id
        )
        session.execute(others.values(is_best=False))
    data = {"step": step, "is_best": is_best, "metrics": metrics, "checkpoint_id": checkpoint_id}
    add_event(session, job_id, f"Checkpoint at step {step}.", type="checkpoint", data=data)
    return True


def retire_checkpoints(session: Session, job_id: str, keep: int) -> list[str]:
    """Marks all checkpoints for deletion except the best one and the `keep` newest ones.

    Returns the store keys of the checkpoints that it has marked. The caller must hold the lease.
    """
    newest = select(Checkpoint.id).where(
        Checkpoint.job_id == job_id, Checkpoint.status == "committed"
    )
    newest = newest.order_by(Checkpoint.step.desc(), Checkpoint.lease_token.desc()).limit(keep)
    retired = update(Checkpoint).where(
        Checkpoint.job_id == job_id,
        Checkpoint.status != "deleting",
        Checkpoint.is_best.is_(False),
        Checkpoint.id.not_in(newest.scalar_subquery()),
    )
    return list(session.scalars(retired.values(status="deleting").returning(Checkpoint.store_key)))


def mark_corrupt(session: Session, job_id: str, token: int, checkpoint_id: str) -> bool:
    """Marks a checkpoint as corrupt and records a warning. Repeating the call changes nothing.

    No run resumes from a corrupt checkpoint.
    """
    if hold(session, job_id, token) is None:
        return False
    mark = update(Checkpoint).where(
        Checkpoint.id == checkpoint_id,
        Checkpoint.job_id == job_id,
        Checkpoint.status == "committed",
    )
    step = session.scalar(mark.values(status="corrupt", is_best=False).returning(Checkpoint.step))
    if step is None:
        return True
    message = f"The checkpoint at step {step} is damaged; the run continues from an older one."
    add_event(
        session, job_id, message, level="warn", data={"step": step, "checkpoint_id": checkpoint_id}
    )
    return True
