"""/v1/batches: files of generation requests, answered in their own time."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from app.api.deps import AskedPage, Principal, require
from app.api.jobs import Repetition
from app.api.strict_route import StrictRoute
from app.db import batches as batch_rows
from app.db.session import transaction
from app.schemas.batches import BatchObject, CreateBatch
from app.schemas.listing import Listing, ends
from app.services.batch import batches

router = APIRouter(route_class=StrictRoute, prefix="/v1/batches", tags=["batches"])
Caller = Annotated[Principal, Depends(require("inference"))]


@router.post("")
def create_batch(
    asked: CreateBatch, caller: Caller, repetition: Repetition, request: Request, response: Response
) -> BatchObject:
    """Every line is judged now: a batch with a fault in it has failed, and its `errors` tell all of them."""
    accepted = batches.create_batch(caller, asked, repetition)
    if accepted.is_replay:
        response.headers["idempotent-replayed"] = "true"
    request.app.state.batch_runner.wake()
    return BatchObject.model_validate(accepted.body)


@router.get("")
def list_batches(caller: Caller, page: AskedPage) -> Listing[BatchObject]:
    with transaction() as session:
        rows, has_more = batch_rows.page_batches(
            session, caller.project_id, after=page.after, limit=page.limit, order=page.order
        )
    data = [BatchObject.of(row) for row in rows]
    first_id, last_id = ends(data)
    return Listing(data=data, first_id=first_id, last_id=last_id, has_more=has_more)


@router.get("/{batch_id}")
def get_batch(batch_id: str, caller: Caller) -> BatchObject:
    with transaction() as session:
        return BatchObject.of(batches.get_batch(session, caller.project_id, batch_id))


@router.post("/{batch_id}/cancel")
def cancel_batch(batch_id: str, caller: Caller, request: Request) -> BatchObject:
    cancelled = BatchObject.of(batches.cancel_batch(caller.project_id, batch_id))
    request.app.state.batch_runner.wake()
    return cancelled
