"""Routes of /v1/batches: files of generation requests that run in the background."""

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
    """Creates a batch from an uploaded file with the purpose `batch`.

    All lines of the file are validated first. If a line is invalid, the batch is created with the
    status `failed`, and its `errors` name the invalid lines. With an `Idempotency-Key` header, a
    retry returns the batch of the first attempt.
    """
    accepted = batches.create_batch(caller, asked, repetition)
    if accepted.is_replay:
        response.headers["idempotent-replayed"] = "true"
    request.app.state.batch_runner.wake()
    return BatchObject.model_validate(accepted.body)


@router.get("")
def list_batches(caller: Caller, page: AskedPage) -> Listing[BatchObject]:
    """Lists the batches of the project, newest first by default."""
    with transaction() as session:
        rows, has_more = batch_rows.page_batches(
            session, caller.project_id, after=page.after, limit=page.limit, order=page.order
        )
    data = [BatchObject.of(row) for row in rows]
    first_id, last_id = ends(data)
    return Listing(data=data, first_id=first_id, last_id=last_id, has_more=has_more)


@router.get("/{batch_id}")
def get_batch(batch_id: str, caller: Caller) -> BatchObject:
    """Returns a batch with its status and the ids of its result files."""
    with transaction() as session:
        return BatchObject.of(batches.get_batch(session, caller.project_id, batch_id))


@router.post("/{batch_id}/cancel")
def cancel_batch(batch_id: str, caller: Caller, request: Request) -> BatchObject:
    """Cancels a batch. It stops within seconds and keeps the answers it has so far."""
    cancelled = BatchObject.of(batches.cancel_batch(caller.project_id, batch_id))
    request.app.state.batch_runner.wake()
    return cancelled
