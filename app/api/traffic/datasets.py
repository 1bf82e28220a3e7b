"""Routes of /v1/datasets: make, list and delete data sets from stored completions."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from app.api.deps import AskedPage, Principal, known_query, require
from app.api.jobs import Repetition, Streamed, answer_events
from app.api.metadata_query import METADATA_QUERY, metadata_pairs
from app.api.openapi import EVENTS
from app.api.strict_route import StrictRoute
from app.db import jobs as job_rows
from app.db.session import transaction
from app.schemas.files import Deleted
from app.schemas.jobs import EventObject
from app.schemas.listing import Listing, ends
from app.schemas.traffic import CreateDataset, DatasetObject
from app.services import jobs
from app.services.traffic import datasets

router = APIRouter(route_class=StrictRoute, prefix="/v1/datasets", tags=["data sets"])
Reader = Annotated[Principal, Depends(require("files:read"))]
Writer = Annotated[Principal, Depends(require("files:write"))]
KIND = "dataset"


@router.post("")
def create_dataset(
    asked: CreateDataset, principal: Writer, repetition: Repetition, response: Response
) -> DatasetObject:
    """Starts a job that makes training, validation and test files from stored completions.

    With an `Idempotency-Key` header, a retry returns the data set of the first attempt.
    """
    accepted = datasets.create_dataset(principal, asked, repetition)
    if accepted.is_replay:
        response.headers["idempotent-replayed"] = "true"
    return DatasetObject.model_validate(accepted.body)


@router.get("", dependencies=[Depends(known_query(METADATA_QUERY))])
def list_datasets(request: Request, principal: Reader, page: AskedPage) -> Listing[DatasetObject]:
    """Lists the data sets of the project, newest first by default.

    `metadata[key]=value` selects the data sets with this metadata.
    """
    with transaction() as session:
        rows, has_more = job_rows.page_jobs(
            session,
            principal.project_id,
            kind=KIND,
            after=page.after,
            limit=page.limit,
            order=page.order,
            metadata=metadata_pairs(request.query_params) or None,
        )
    data = [DatasetObject.of(row) for row in rows]
    first_id, last_id = ends(data)
    return Listing(data=data, first_id=first_id, last_id=last_id, has_more=has_more)


@router.get("/{dataset_id}")
def get_dataset(dataset_id: str, principal: Reader) -> DatasetObject:
    """Returns a data set with its status, its files and its report."""
    with transaction() as session:
        return DatasetObject.of(jobs.get_job(session, principal.project_id, dataset_id, KIND))


@router.post("/{dataset_id}/cancel")
def cancel_dataset(dataset_id: str, principal: Writer) -> DatasetObject:
    """Cancels the job that makes a data set."""
    return DatasetObject.of(jobs.cancel_job(principal.project_id, dataset_id, KIND))


@router.delete("/{dataset_id}")
def delete_dataset(dataset_id: str, principal: Writer) -> Deleted:
    """Deletes a data set that has ended, with its files. The stored completions remain."""
    datasets.delete_dataset(principal.project_id, dataset_id)
    return Deleted(id=dataset_id, object="dataset")


@router.get("/{dataset_id}/events", response_model=Listing[EventObject], responses=EVENTS)
def list_dataset_events(
    dataset_id: str, principal: Reader, page: AskedPage, is_streamed: Streamed
) -> Response | Listing[EventObject]:
    """Lists the events of a data set's job, newest first by default.

    With `?stream=true` or `Accept: text/event-stream`, sends the events as they happen, oldest
    first, until the job has ended.
    """
    with transaction() as session:
        jobs.get_job(session, principal.project_id, dataset_id, KIND)
    return answer_events(dataset_id, page, is_streamed)
