"""Routes of the files of models."""

from typing import Annotated

from fastapi import APIRouter, Depends, Response
from fastapi.responses import StreamingResponse

from app.api.deps import Principal, require
from app.api.models.file_ranges import RangeHeaders, file_response
from app.api.openapi import MARKDOWN, PART_OF_BYTES
from app.api.strict_route import StrictRoute
from app.schemas.listing import Listing
from app.schemas.models import ModelFile
from app.services.models import cards
from app.services.models import files as model_files

router = APIRouter(route_class=StrictRoute, prefix="/v1/models", tags=["models"])
Reader = Annotated[Principal, Depends(require("models:read"))]


@router.get("/{model_id}/card", response_class=Response, responses=MARKDOWN)
def get_card(model_id: str, principal: Reader) -> Response:
    """Returns the model card in Markdown, with YAML front matter."""
    card = cards.get_card(principal.project_id, model_id)
    return Response(card, media_type="text/markdown; charset=utf-8")


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
    model_id: str, file_name: str, principal: Reader, requested: RangeHeaders
) -> Response:
    """Downloads a file of a model, or the part of it that a `Range` header names.

    To resume a download safely, send the ETag of its first part as `If-Range`. If the file has
    changed, the response is the complete new file.
    """
    file = model_files.get_file(principal.project_id, model_id, file_name)
    return file_response(requested, file.read, num_bytes=file.size_bytes, sha256=file.sha256)


@router.head("/{model_id}/files/{file_name:path}", include_in_schema=False)
def head_model_file(
    model_id: str, file_name: str, principal: Reader, requested: RangeHeaders
) -> Response:
    """Returns the headers of the download, without the file."""
    file = model_files.get_file(principal.project_id, model_id, file_name)
    return file_response(
        requested, lambda _: iter(()), num_bytes=file.size_bytes, sha256=file.sha256
    )
