"""Routes of /v1/webhook_endpoints: receivers of events, and the log of their deliveries."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response

from app.api.deps import AskedPage, Principal, known_query, require
from app.api.jobs import Repetition
from app.api.strict_route import StrictRoute
from app.db.session import transaction
from app.db.webhooks import deliveries as delivery_rows
from app.db.webhooks import endpoints as endpoint_rows
from app.db.webhooks.outbox import EVENT_TYPES
from app.schemas.listing import Listing, ends
from app.schemas.webhooks.endpoints import (
    CreateEndpoint,
    DeletedEndpoint,
    DeliveryObject,
    DeliveryStatus,
    EndpointObject,
    EndpointTest,
    EndpointWithSecret,
    EventTypeList,
    RotateSecret,
    TestEndpoint,
    UpdateEndpoint,
)
from app.services.webhooks import endpoints

router = APIRouter(route_class=StrictRoute, prefix="/v1", tags=["webhooks"])
Reader = Annotated[Principal, Depends(require("jobs:read"))]
Writer = Annotated[Principal, Depends(require("jobs:write"))]
KNOWN_QUERY = Depends(known_query())


@router.get("/webhook_event_types")
def list_event_types(principal: Reader) -> EventTypeList:
    """Lists the event types that an endpoint can subscribe to."""
    return EventTypeList(data=list(EVENT_TYPES))


@router.post("/webhook_endpoints")
def create_endpoint(
    asked: CreateEndpoint, principal: Writer, repetition: Repetition, response: Response
) -> EndpointWithSecret:
    """Creates an endpoint. The signing secret is only in this response.

    With an `Idempotency-Key` header, a retry returns the endpoint of the first attempt.
    """
    created, is_replay = endpoints.create_endpoint(principal, asked, repetition)
    if is_replay:
        response.headers["idempotent-replayed"] = "true"
    return created


@router.get("/webhook_endpoints", dependencies=[KNOWN_QUERY])
def list_endpoints(principal: Reader, page: AskedPage) -> Listing[EndpointObject]:
    """Lists the endpoints of the project, newest first by default."""
    with transaction() as session:
        rows, has_more = endpoint_rows.page_endpoints(
            session, principal.project_id, after=page.after, limit=page.limit, order=page.order
        )
    data = [EndpointObject.of(row) for row in rows]
    first_id, last_id = ends(data)
    return Listing(data=data, first_id=first_id, last_id=last_id, has_more=has_more)


@router.get("/webhook_endpoints/{webhook_endpoint_id}")
def get_endpoint(webhook_endpoint_id: str, principal: Reader) -> EndpointObject:
    """Returns an endpoint without its secret."""
    with transaction() as session:
        row = endpoints.get_endpoint(session, principal.project_id, webhook_endpoint_id)
        return EndpointObject.of(row)


@router.post("/webhook_endpoints/{webhook_endpoint_id}")
def update_endpoint(
    webhook_endpoint_id: str, asked: UpdateEndpoint, principal: Writer
) -> EndpointObject:
    """Changes the name, the URL or the event types of an endpoint, or enables or disables it."""
    return endpoints.update_endpoint(principal.project_id, webhook_endpoint_id, asked)


@router.delete("/webhook_endpoints/{webhook_endpoint_id}")
def delete_endpoint(webhook_endpoint_id: str, principal: Writer) -> DeletedEndpoint:
    """Deletes an endpoint with its deliveries. Pending deliveries are not sent."""
    endpoints.delete_endpoint(principal.project_id, webhook_endpoint_id)
    return DeletedEndpoint(id=webhook_endpoint_id)


@router.post("/webhook_endpoints/{webhook_endpoint_id}/rotate_secret")
def rotate_secret(
    webhook_endpoint_id: str,
    principal: Writer,
    repetition: Repetition,
    response: Response,
    asked: RotateSecret | None = None,
) -> EndpointWithSecret:
    """Replaces the signing secret. The new one is only in this response.

    A retry with the same `Idempotency-Key` header returns the present secret, and does not replace
    it again.
    """
    keeps_old = asked is not None and asked.keep_old_secret_active_for_24_hours
    rotated, is_replay = endpoints.rotate_secret(
        principal, webhook_endpoint_id, repetition, keeps_old=keeps_old
    )
    if is_replay:
        response.headers["idempotent-replayed"] = "true"
    return rotated


@router.post("/webhook_endpoints/{webhook_endpoint_id}/test")
def test_endpoint(webhook_endpoint_id: str, asked: TestEndpoint, principal: Writer) -> EndpointTest:
    """Sends a sample event to an endpoint and returns the status code of its response."""
    return endpoints.test_endpoint(principal.project_id, webhook_endpoint_id, asked.event_type)


@router.get("/webhook_endpoints/{webhook_endpoint_id}/deliveries", dependencies=[KNOWN_QUERY])
def list_deliveries(
    webhook_endpoint_id: str,
    principal: Reader,
    page: AskedPage,
    status: Annotated[DeliveryStatus | None, Query()] = None,
) -> Listing[DeliveryObject]:
    """Lists the deliveries of an endpoint with their attempts, newest first by default."""
    with transaction() as session:
        row = endpoints.get_endpoint(session, principal.project_id, webhook_endpoint_id)
        rows, has_more = delivery_rows.page_deliveries(
            session,
            row.id,
            status=status,
            after=page.after,
            limit=page.limit,
            order=page.order,
        )
    data = [DeliveryObject.of(delivery, event) for delivery, event in rows]
    first_id, last_id = ends(data)
    return Listing(data=data, first_id=first_id, last_id=last_id, has_more=has_more)


@router.post("/webhook_endpoints/{webhook_endpoint_id}/deliveries/{delivery_id}/replay")
def replay_delivery(
    webhook_endpoint_id: str, delivery_id: str, principal: Writer
) -> DeliveryObject:
    """Sends a delivery again within seconds, also if it has succeeded before."""
    return endpoints.replay_delivery(principal.project_id, webhook_endpoint_id, delivery_id)
