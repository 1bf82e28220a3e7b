"""Routes of imports of models."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from starlette.concurrency import run_in_threadpool

from app.api.deps import AskedPage, Principal, require
from app.api.jobs import Repetition, Streamed, answer_events
from app.api.openapi import EVENTS
from app.api.strict_route import StrictRoute
from app.db.session import transaction
from app.schemas.jobs import EventObject, ImportObject
from app.schemas.listing import Listing
from app.schemas.models import ImportModel
from app.services import jobs
from app.services.models.uploads import ModelUpload, too_large
from app.settings import get_settings

router = APIRouter(route_class=StrictRoute, prefix="/v1/models", tags=["models"])
Reader = Annotated[Principal, Depends(require("models:read"))]
Writer = Annotated[Principal, Depends(require("models:write"))]

FORM_BYTES = 2**20  # maximum size of a multipart body in addition to the files
GATHERED_BYTES = 2**20  # written at once, because each write needs a thread
UPLOAD_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["name", "file"],
                    "properties": {
                        "name": {"type": "string", "pattern": "^[a-z0-9][a-z0-9._-]{0,63}$"},
                        "file": {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                        },
                    },
                }
            }
        },
    }
}


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


@router.post("/imports", openapi_extra=UPLOAD_BODY)
async def upload_model(
    request: Request, principal: Writer, repetition: Repetition, response: Response
) -> ImportObject:
    """Uploads a model and starts its import: the files of a folder, an archive or a .gguf file.

    The body is multipart/form-data with the field `name`, followed by one part `file` per file. The
    import is a job, as with `POST /v1/models/import`.
    """
    # Async, because the body is processed while it arrives. The thread pool writes the pieces.
    settings = get_settings()
    # The upload knows the limit of the files; the body has some bytes more.
    body_cap = settings.max_import_bytes + FORM_BYTES
    length = request.headers.get("content-length", "")
    upload = await run_in_threadpool(
        ModelUpload,
        principal,
        request.headers.get("content-type", ""),
        repetition,
        num_bytes=int(length) if length.isdecimal() else None,
    )
    num_bytes, gathered = 0, bytearray()
    try:
        async for piece in request.stream():
            num_bytes += len(piece)
            if num_bytes > body_cap:
                raise too_large()
            if upload.fault is None:
                gathered += piece
            if len(gathered) >= GATHERED_BYTES:
                full, gathered = gathered, bytearray()
                await run_in_threadpool(upload.feed, bytes(full))
        accepted = await run_in_threadpool(upload.finish, bytes(gathered))
    finally:
        await run_in_threadpool(upload.close)
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
