"""Routes of /v1/files: upload, list, download and delete files."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from app.api.deps import Principal, require
from app.api.openapi import BYTES
from app.db import files as file_rows
from app.db.session import transaction
from app.schemas.files import Deleted, FileObject
from app.schemas.listing import Listing, ends
from app.services import files
from app.settings import get_settings

router = APIRouter(prefix="/v1/files", tags=["files"])
Reader = Annotated[Principal, Depends(require("files:read"))]
Writer = Annotated[Principal, Depends(require("files:write"))]

FORM_BYTES = 64 * 1024  # maximum size of a multipart body in addition to the file
UPLOAD_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(files.PURPOSES)},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": 3600,
                            "maximum": 2_592_000,
                        },
                    },
                }
            }
        },
    }
}


@router.post("", openapi_extra=UPLOAD_BODY)
async def upload_file(request: Request, principal: Writer) -> FileObject:
    """Uploads a file as multipart/form-data with the parts `file` and `purpose`.

    Files with the purpose `fine-tune` or `distillation` are validated row by row.
    """
    # Async, because the body is processed while it arrives. The thread pool writes the pieces.
    # After an error the body is still read, up to the limit: some clients read the response only
    # after they have sent everything.
    settings = get_settings()
    body_cap = settings.max_file_bytes + FORM_BYTES
    upload = files.Upload(principal, request.headers.get("content-type", ""), settings)
    num_bytes = 0
    try:
        async for piece in request.stream():
            num_bytes += len(piece)
            if num_bytes > body_cap:
                raise files.too_large(settings)
            if upload.fault is None:
                await run_in_threadpool(upload.feed, piece)
    except BaseException:
        upload.abandon()
        raise
    return FileObject.of(await run_in_threadpool(upload.finish))


@router.get("")
def list_files(
    principal: Reader,
    purpose: str | None = None,
    after: Annotated[str | None, Query(max_length=200)] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> Listing[FileObject]:
    """Lists the files of the project, newest first by default."""
    with transaction() as session:
        rows, has_more = file_rows.page_files(
            session, principal.project_id, purpose=purpose, after=after, limit=limit, order=order
        )
    data = [FileObject.of(row) for row in rows]
    first_id, last_id = ends(data)
    return Listing(data=data, first_id=first_id, last_id=last_id, has_more=has_more)


@router.get("/{file_id}")
def get_file(file_id: str, principal: Reader) -> FileObject:
    """Returns the metadata of a file."""
    return FileObject.of(files.get_file(principal.project_id, file_id))


@router.delete("/{file_id}")
def delete_file(file_id: str, principal: Writer) -> Deleted:
    """Deletes a file. Refused with 409 while a job or a batch needs the file."""
    files.delete_file(principal.project_id, file_id)
    return Deleted(id=file_id, object="file")


@router.get("/{file_id}/content", response_class=StreamingResponse, responses=BYTES)
def get_content(file_id: str, principal: Reader) -> StreamingResponse:
    """Downloads the content of a file."""
    row = files.get_file(principal.project_id, file_id)
    return StreamingResponse(
        files.read_content(row),
        media_type="application/octet-stream",
        headers={"content-length": str(row.bytes), "content-disposition": "attachment"},
    )
