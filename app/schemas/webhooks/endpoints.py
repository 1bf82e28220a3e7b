"""Bodies of /v1/webhook_endpoints: OpenAI's objects with additional fields."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, StringConstraints

from app.contracts.distillation import NO_NUL
from app.db.schema.webhook_tables import WebhookDelivery, WebhookEndpoint, WebhookEvent
from app.db.webhooks.outbox import EventType
from app.schemas.jobs import Body, Json, seconds

EventTypes = Annotated[list[EventType], Field(min_length=1, max_length=50)]
EndpointName = Annotated[
    str, StringConstraints(min_length=1, max_length=200, pattern=NO_NUL, strip_whitespace=True)
]
Url = Annotated[str, StringConstraints(min_length=1, max_length=2048)]
DeliveryStatus = Literal["pending", "succeeded", "failed"]


class CreateEndpoint(Body):
    """Body of a request that creates an endpoint."""

    event_types: EventTypes
    name: EndpointName
    url: Url


class UpdateEndpoint(Body):
    """Body of a request that changes an endpoint. Fields that are missing stay as they are.

    `enabled` is an extension. It enables an endpoint that was disabled, or disables it.
    """

    event_types: EventTypes | None = None
    name: EndpointName | None = None
    url: Url | None = None
    enabled: bool | None = None


class RotateSecret(Body):
    """Body of a request that replaces the signing secret."""

    keep_old_secret_active_for_24_hours: bool = False


class TestEndpoint(Body):
    """Body of a request that sends a sample event."""

    __test__ = False  # not a test class for pytest

    event_type: EventType


class EndpointObject(BaseModel):
    """Webhook endpoint. `signing_secret_hint` has the end of the secret.

    `enabled`, `disabled_reason` and `failing_since` are extensions. `failing_since` is the time of
    the first failed attempt since the last success.
    """

    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    created_at: int
    event_types: list[str]
    name: str
    url: str
    signing_secret_hint: str
    updated_at: int
    enabled: bool
    disabled_reason: str | None
    failing_since: int | None

    @classmethod
    def of(cls, row: WebhookEndpoint) -> "EndpointObject":
        return cls(**_fields(row))


class EndpointWithSecret(EndpointObject):
    """Webhook endpoint with its signing secret, which is not shown again."""

    signing_secret: str

    @classmethod
    def of(cls, row: WebhookEndpoint) -> "EndpointWithSecret":
        return cls(**_fields(row), signing_secret=row.secret)


class DeletedEndpoint(BaseModel):
    """Confirmation that an endpoint has been deleted."""

    id: str
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    deleted: Literal[True] = True


class EndpointTest(BaseModel):
    """Response of a receiver to a sample event. `success` says that there was a response."""

    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    webhook_endpoint_id: str
    event_type: str
    status_code: int
    success: Literal[True] = True


class EventTypeList(BaseModel):
    """Event types that an endpoint can subscribe to."""

    object: Literal["list"] = "list"
    data: list[str]


class EventObject(BaseModel):
    """Event as it is sent to receivers."""

    id: str
    object: Literal["event"] = "event"
    created_at: int
    type: str
    data: Json

    @classmethod
    def of(cls, row: WebhookEvent) -> "EventObject":
        return cls(
            id=row.id, created_at=int(row.created_at.timestamp()), type=row.type, data=row.data
        )


class AttemptObject(BaseModel):
    """One attempt. `status_code` is null without a response, and `error` after a success."""

    attempted_at: int
    duration_seconds: float
    status_code: int | None
    error: str | None


class DeliveryObject(BaseModel):
    """Delivery of one event to one endpoint, with its newest attempts, oldest first."""

    id: str
    object: Literal["webhook_endpoint.delivery"] = "webhook_endpoint.delivery"
    webhook_endpoint_id: str
    created_at: int
    status: DeliveryStatus
    event: EventObject
    num_attempts: int
    next_attempt_at: int | None
    attempts: list[AttemptObject]

    @classmethod
    def of(cls, row: WebhookDelivery, event: WebhookEvent) -> "DeliveryObject":
        return cls(
            id=row.id,
            webhook_endpoint_id=row.endpoint_id,
            created_at=int(row.created_at.timestamp()),
            status=row.status,
            event=EventObject.of(event),
            num_attempts=row.num_attempts,
            next_attempt_at=seconds(row.next_attempt_at),
            attempts=[AttemptObject(**attempt) for attempt in row.attempts],
        )


def _fields(row: WebhookEndpoint) -> Json:
    return {
        "id": row.id,
        "created_at": int(row.created_at.timestamp()),
        "event_types": row.event_types,
        "name": row.name,
        "url": row.url,
        "signing_secret_hint": _hint(row.secret),
        "updated_at": int(row.updated_at.timestamp()),
        "enabled": row.disabled_at is None,
        "disabled_reason": row.disabled_reason,
        "failing_since": seconds(row.failing_since),
    }


def _hint(secret: str) -> str:
    """Returns a text that identifies a secret without revealing it."""
    prefix, _, code = secret.partition("_")
    return f"{prefix}_...{code.rstrip('=')[-4:]}"
