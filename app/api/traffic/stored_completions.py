"""Routes of /v1/chat/completions for stored completions: list, read, change and delete them."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request, Response

from app.api.deps import Page, Principal, known_query, page, require
from app.api.metadata_query import METADATA_QUERY, metadata_pairs
from app.api.strict_route import StrictRoute
from app.db.traffic.completions import CompletionFilter, time_of
from app.schemas.listing import Listing
from app.schemas.traffic import (
    DeletedCompletion,
    StoredCompletionObject,
    StoredMessage,
    UpdateCompletion,
)
from app.services.traffic import stored_completions

router = APIRouter(
    route_class=StrictRoute, prefix="/v1/chat/completions", tags=["stored completions"]
)
Reader = Annotated[Principal, Depends(require("files:read"))]
Writer = Annotated[Principal, Depends(require("files:write"))]
Seconds = Annotated[int | None, Query(ge=0, le=2**33, description="In seconds since the epoch")]


def oldest_first(
    after: Annotated[str | None, Query(max_length=200)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "asc",
) -> Page:
    """Reads the page from the query parameters. Oldest first is OpenAI's default here."""
    return page(after, limit, order)


OldestFirst = Annotated[Page, Depends(oldest_first)]


@router.get(
    "",
    response_model=Listing[StoredCompletionObject],
    dependencies=[Depends(known_query(METADATA_QUERY))],
)
def list_completions(
    request: Request,
    principal: Reader,
    page: OldestFirst,
    model: Annotated[str | None, Query(max_length=200)] = None,
    created_after: Seconds = None,
    created_before: Seconds = None,
) -> Response:
    """Lists the stored completions of the project, oldest first by default.

    `metadata[key]=value` selects by metadata. `created_after` includes its second, and
    `created_before` does not.
    """
    wanted = CompletionFilter(
        model,
        metadata_pairs(request.query_params),
        time_of(created_after),
        time_of(created_before),
    )
    content = stored_completions.list_completions(
        principal.project_id, wanted, after=page.after, limit=page.limit, order=page.order
    )
    return _json(content)


@router.get("/{completion_id}", response_model=StoredCompletionObject)
def get_completion(completion_id: str, principal: Reader) -> Response:
    """Returns a stored completion."""
    row = stored_completions.get_completion(principal.project_id, completion_id)
    return _json(stored_completions.completion_json(row))


@router.post("/{completion_id}", response_model=StoredCompletionObject)
def update_completion(completion_id: str, body: UpdateCompletion, principal: Writer) -> Response:
    """Replaces the metadata of a stored completion."""
    content = stored_completions.set_metadata(
        principal.project_id, completion_id, body.metadata or {}
    )
    return _json(content)


@router.delete("/{completion_id}")
def delete_completion(completion_id: str, principal: Writer) -> DeletedCompletion:
    """Deletes a stored completion. Data sets that were made from it remain."""
    stored_completions.delete_completion(principal.project_id, completion_id)
    return DeletedCompletion(id=completion_id)


@router.get("/{completion_id}/messages", response_model=Listing[StoredMessage])
def list_messages(completion_id: str, principal: Reader, page: OldestFirst) -> Response:
    """Lists the messages of a stored request, in their order by default, without the answer."""
    content = stored_completions.messages_json(
        principal.project_id,
        completion_id,
        after=page.after,
        limit=page.limit,
        order=page.order,
    )
    return _json(content)


def _json(content: bytes) -> Response:
    return Response(content, media_type="application/json")
