"""Routes of /v1/models: registered models, their files and aliases, and imports."""

from typing import Annotated

from fastapi import APIRouter, Depends, Response
from fastapi.responses import StreamingResponse

from app.api.deps import AskedPage, Principal, require
from app.api.file_ranges import RangeHeaders, file_response
from app.api.jobs import Repetition, Streamed, answer_events
from app.api.openapi import EVENTS, PART_OF_BYTES
from app.api.strict_route import StrictRoute
from app.db import models as model_rows
from app.db.session import transaction
from app.schemas.files import Deleted
from app.schemas.jobs import EventObject, ImportObject
from app.schemas.listing import Listing
from app.schemas.models import (
    AliasObject,
    ImportModel,
    ModelFile,
    ModelList,
    ModelObject,
    SetAlias,
)
from app.services import jobs, model_files, model_registry

router = APIRouter(route_class=StrictRoute, prefix="/v1/models", tags=["models"])
Reader = Annotated[Principal, Depends(require("models:read"))]
Writer = Annotated[Principal, Depends(require("models:write"))]


@router.get("")
def list_models(principal: Reader) -> ModelList:
    """Lists all models that the project may use, including those shared by all projects."""
    with transaction() as session:
        aliases = model_rows.aliases_of_models(session, principal.project_id)
        rows = model_rows.list_models(session, principal.project_id)
        return ModelList(data=[ModelObject.of(row, aliases.get(row.id, [])) for row in rows])


@router.post("/import")
def import_model(
    asked: ImportModel, principal: Writer, repetition: Repetition, response: Response
) -> ImportObject:
    """Starts the import of a model from the Hugging Face Hub.

    The import is a job. With an `Idempotency-Key` header, a retry returns the job of the first
    attempt.
    """
    accepted = jobs.create_import(principal, asked, repetition)
    if accepted.is_replay:
        response.headers["idempotent-replayed"] = "true"
    return ImportObject.model_validate(accepted.body)


@router.get("/imports/{job_id}")
def get_import(job_id: str, principal: Reader) -> ImportObject:
    """Returns an import job with its status and progress."""
    with transaction() as session:
        return ImportObject.of(jobs.get_job(session, principal.project_id, job_id, "import"))


@router.post("/imports/{job_id}/cancel")
def cancel_import(job_id: str, principal: Writer) -> ImportObject:
    """Cancels an import job: at once if it is waiting, within one heartbeat if it is running."""
    return ImportObject.of(jobs.cancel_job(principal.project_id, job_id, "import"))


@router.get("/imports/{job_id}/events", response_model=Listing[EventObject], responses=EVENTS)
def list_import_events(
    job_id: str, principal: Reader, page: AskedPage, is_streamed: Streamed
) -> Response | Listing[EventObject]:
    """Lists the events of an import job, newest first by default.

    With `?stream=true` or `Accept: text/event-stream`, sends the events as they happen, oldest
    first, until the job has ended.
    """
    with transaction() as session:
        jobs.get_job(session, principal.project_id, job_id, "import")
    return answer_events(job_id, page, is_streamed)


@router.get("/{model_id}")
def get_model(model_id: str, principal: Reader) -> ModelObject:
    """Returns the model version with this id, or the one that an alias points at."""
    with transaction() as session:
        row = model_registry.get_model(session, principal.project_id, model_id)
        return ModelObject.of(
            row, model_rows.aliases_of_models(session, principal.project_id).get(row.id, [])
        )


@router.get("/{model_id}/files")
def list_model_files(model_id: str, principal: Reader) -> Listing[ModelFile]:
    """Lists all files of a model, sorted by name."""
    files = model_files.list_files(principal.project_id, model_id)
    return Listing(
        data=[
            ModelFile(name=file.name, bytes=file.size_bytes, sha256=file.sha256) for file in files
        ]
    )


@router.get(
    "/{model_id}/files/{file_name:path}",
    response_class=StreamingResponse,
    responses=PART_OF_BYTES,
)
def get_model_file(
    model_id: str, file_name: str, principal: Reader, asked: RangeHeaders
) -> Response:
    """Downloads a file of a model, or the part of it that a `Range` header names.

    To resume a download safely, send the ETag of its first part as `If-Range`. If the file has
    changed, the response is the complete new file.
    """
    file = model_files.get_file(principal.project_id, model_id, file_name)
    return file_response(asked, file.read, num_bytes=file.size_bytes, sha256=file.sha256)


@router.delete("/{model_id}")
def delete_model(model_id: str, principal: Writer) -> Deleted:
    """Deletes a model of the project. Refused with 409 while the model is in use."""
    model_registry.delete_model(principal, model_id)
    return Deleted(id=model_id, object="model")


@router.put("/{name}/aliases/{alias}")
def set_alias(name: str, alias: str, asked: SetAlias, principal: Writer) -> AliasObject:
    """Points the alias `{name}@{alias}` at a model. New requests for the alias use this model."""
    return AliasObject.of(model_registry.set_alias(principal, name, alias, model_id=asked.model))


@router.delete("/{name}/aliases/{alias}")
def delete_alias(name: str, alias: str, principal: Writer) -> Deleted:
    """Deletes the alias `{name}@{alias}`. The model remains."""
    model_registry.delete_alias(principal, name, alias)
    return Deleted(id=f"{name}@{alias}", object="model.alias")
