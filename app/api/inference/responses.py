"""Routes of /v1/responses. They answer a request as the same chat would be answered."""

import time

from fastapi import APIRouter, Request, Response

from app.api.completions import AdmissionRoute, Caller, respond
from app.api.openapi import whole_or_streamed
from app.errors import BadRequest, NotFound
from app.schemas.generated import ResponseObject
from app.schemas.responses.answer import ResponseAnswer
from app.schemas.responses.body import ResponseBody

router = APIRouter(prefix="/v1/responses", tags=["generation"], route_class=AdmissionRoute)


@router.post("", responses=whole_or_streamed(ResponseObject))
async def create_response(body: ResponseBody, request: Request, caller: Caller) -> Response:
    """Generates the items that follow the input: a message, or calls of functions.

    Responses are not stored, so each request contains all items. With `stream`, the items are sent
    as server-sent events.
    """
    body.refuse_state()
    answer = ResponseAnswer(body, created=int(time.time()))
    try:
        return await respond(request, caller, body.chat(), answer)
    except BadRequest as error:
        raise body.renamed(error) from None


@router.get("/{response_id}")
@router.delete("/{response_id}")
@router.get("/{response_id}/input_items")
@router.post("/{response_id}/cancel")
def refuse_stored_response(response_id: str, caller: Caller) -> None:
    """Answers 404 for every id, because responses are not stored."""
    raise NotFound(
        f"Response with id {response_id!r} not found. Responses are not stored.",
        param="response_id",
    )
