"""Creates, changes, tests and deletes webhook endpoints, and replays their deliveries."""

import asyncio
import threading
from datetime import UTC, datetime
from typing import Any, Final

from app.auth import Principal
from app.db import submissions
from app.db.locks import lock_project
from app.db.schema.ids import new_id
from app.db.schema.webhook_tables import WebhookEndpoint
from app.db.session import Session, transaction
from app.db.webhooks import deliveries, endpoints
from app.db.webhooks.outbox import EventType
from app.errors import BadRequest, Conflict, NotFound, QuotaExceeded, TooManyRequests
from app.schemas.webhooks.endpoints import (
    CreateEndpoint,
    DeliveryObject,
    EndpointObject,
    EndpointTest,
    EndpointWithSecret,
    UpdateEndpoint,
)
from app.services.jobs import DUPLICATE_SECONDS, claim, find_replay, fingerprint, remember
from app.services.retries import (
    MAX_RETRY_COUNT,
    MAX_TIMEOUT_SECONDS,
    RETRY_DELAY_SECONDS,
    RetryInfo,
)
from app.services.webhooks.sender import Message, send, webhook_guard
from app.services.webhooks.signatures import new_secret

ROUTE: Final = "POST /v1/webhook_endpoints"
ROTATE_ROUTE: Final = f"{ROUTE}/{{webhook_endpoint_id}}/rotate_secret"
DISABLED_BY_REQUEST: Final = "disabled by a request"
MAX_ENDPOINTS: Final = 20  # per project
OVERLAP_SECONDS: Final = 86_400.0
# A test waits for its receiver in a thread of the pool that all requests of the process share.
TESTS: Final = threading.BoundedSemaphore(4)


def create_endpoint(
    principal: Principal, asked: CreateEndpoint, attempted: RetryInfo
) -> tuple[EndpointWithSecret, bool]:
    """Creates an endpoint with a new secret.

    Returns it, and whether the request is a retry, for which the first request's endpoint is
    returned.

    Raises:
        ForbiddenUrl: The service must not connect to the URL.
        NotFound: The request is a retry, and its endpoint has been deleted since.
        QuotaExceeded: The project has too many endpoints.
        Unprocessable: The idempotency key was used with another body.
        InProgress: The first request with this key is still being processed.
    """
    webhook_guard().parse(asked.url)
    project_id = principal.project_id
    sha256 = fingerprint(asked.model_dump(mode="json"))
    columns: dict[str, Any] = {  # Any: columns of WebhookEndpoint, by name
        "name": asked.name,
        "url": asked.url,
        "event_types": list(dict.fromkeys(asked.event_types)),
    }
    replay = find_replay(principal, ROUTE, attempted, sha256)
    with transaction() as session:
        # Only the id is stored under the key, so that the secret is in one table alone.
        stored = replay.body if replay else claim(session, principal, ROUTE, attempted, sha256)
        if stored is not None:
            row = get_endpoint(session, project_id, stored["id"])
            return EndpointWithSecret.of(row), True
        lock_project(session, project_id)
        if attempted.retry_count and attempted.idempotency_key is None:
            same = endpoints.find_recent(session, project_id, seconds=DUPLICATE_SECONDS, **columns)
            if same is not None:
                return EndpointWithSecret.of(same), True
        if endpoints.count_endpoints(session, project_id) >= MAX_ENDPOINTS:
            raise QuotaExceeded(
                f"the project has {MAX_ENDPOINTS} webhook endpoints; delete one first"
            )
        row = endpoints.insert_endpoint(
            session, id=new_id("we_"), project_id=project_id, secret=new_secret(), **columns
        )
        remember(session, principal, ROUTE, attempted, {"id": row.id})
        return EndpointWithSecret.of(row), False


def get_endpoint(
    session: Session, project_id: str, endpoint_id: str, *, lock: bool = False
) -> WebhookEndpoint:
    """Returns the project's endpoint with this id. Raises NotFound.

    lock: Prevents changes by other transactions until this one ends.
    """
    row = endpoints.find_endpoint(session, project_id, endpoint_id, lock=lock)
    if row is None:
        raise NotFound(
            f"the webhook endpoint {endpoint_id!r} does not exist", param="webhook_endpoint_id"
        )
    return row


def update_endpoint(project_id: str, endpoint_id: str, asked: UpdateEndpoint) -> EndpointObject:
    """Changes an endpoint. Its pending deliveries are sent to the new URL.

    Failures are those of one URL. A new URL therefore ends their count, and enables an endpoint
    that the service has disabled. An endpoint that a request has disabled stays disabled.

    Raises NotFound, and ForbiddenUrl if the service must not connect to the new URL.
    """
    if asked.url is not None:
        webhook_guard().parse(asked.url)
    with transaction() as session:
        row = get_endpoint(session, project_id, endpoint_id, lock=True)
        wanted: dict[str, Any] = asked.model_dump(  # Any: columns of WebhookEndpoint, by name
            exclude={"enabled"}, exclude_none=True
        )
        if "event_types" in wanted:
            wanted["event_types"] = list(dict.fromkeys(wanted["event_types"]))
        columns = {name: value for name, value in wanted.items() if getattr(row, name) != value}
        columns |= _state_changes(session, row, asked, is_moved="url" in columns)
        if columns:
            row = endpoints.change_endpoint(session, row.id, **columns)
        return EndpointObject.of(row)


def _state_changes(
    session: Session, row: WebhookEndpoint, asked: UpdateEndpoint, *, is_moved: bool
) -> dict[str, Any]:  # Any: columns of WebhookEndpoint, by name
    """Returns changes of the disabled state and of the failure count.

    is_moved: The request changes the URL.
    """
    is_disabled = row.disabled_at is not None
    is_disabled_by_service = is_disabled and row.disabled_reason != DISABLED_BY_REQUEST
    columns: dict[str, Any] = {}
    is_enabled_now = is_disabled and (
        asked.enabled is True or (asked.enabled is None and is_moved and is_disabled_by_service)
    )
    if is_enabled_now:
        columns |= {"disabled_at": None, "disabled_reason": None}
    if is_enabled_now or is_moved:
        columns |= {"num_failures": 0, "failing_since": None}
    if asked.enabled is False and row.disabled_reason != DISABLED_BY_REQUEST:
        columns |= {
            "disabled_at": row.disabled_at or deliveries.server_time(session),
            "disabled_reason": DISABLED_BY_REQUEST,
        }
    return columns


def delete_endpoint(project_id: str, endpoint_id: str) -> None:
    """Deletes an endpoint. Its pending deliveries are not sent. Raises NotFound."""
    with transaction() as session:
        row = get_endpoint(session, project_id, endpoint_id)
        endpoints.delete_endpoint(session, project_id, row.id)


def rotate_secret(
    principal: Principal, endpoint_id: str, attempted: RetryInfo, *, keeps_old: bool
) -> tuple[EndpointWithSecret, bool]:
    """Replaces the secret. With `keeps_old`, the old one signs as well for a day.

    Returns the endpoint with its current secret, and whether the request is a retry. A retry does
    not replace the secret again.

    Raises:
        NotFound: The project has no such endpoint.
        Unprocessable: The idempotency key was used with another body or endpoint.
        InProgress: The first request with this key is still being processed.
    """
    project_id = principal.project_id
    sha256 = fingerprint({"id": endpoint_id, "keeps_old": keeps_old})
    replay = find_replay(principal, ROTATE_ROUTE, attempted, sha256)
    with transaction() as session:
        # Only the id is stored under the key, so that the secret is in one table alone.
        stored = replay.body if replay else None
        stored = stored or claim(session, principal, ROTATE_ROUTE, attempted, sha256)
        lock_project(session, project_id)
        row = get_endpoint(session, project_id, endpoint_id, lock=True)
        if stored is not None or _is_repeated_rotation(session, principal, attempted, sha256):
            return EndpointWithSecret.of(row), True
        overlap_seconds = OVERLAP_SECONDS if keeps_old else 0.0
        rotated = endpoints.rotate_secret(
            session, row, new_secret(), overlap_seconds=overlap_seconds
        )
        remember(session, principal, ROTATE_ROUTE, attempted, {"id": row.id})
        return EndpointWithSecret.of(rotated), False


def _is_repeated_rotation(
    session: Session, principal: Principal, attempted: RetryInfo, sha256: str
) -> bool:
    """Returns whether a request without an idempotency key is a retry of an earlier rotation.

    If it is not, the rotation is recorded in the transaction that replaces the secret. The caller
    has called `lock_project`.
    """
    if attempted.idempotency_key is not None:
        return False
    request = submissions.Request(principal.project_id, principal.key_id, ROTATE_ROUTE, sha256)
    retry_count = min(attempted.retry_count, MAX_RETRY_COUNT)
    seconds = min(attempted.timeout_seconds, MAX_TIMEOUT_SECONDS) + RETRY_DELAY_SECONDS
    found = None
    if retry_count:
        found = submissions.find_repeated(session, request, retry_count, retry_seconds=seconds)
    if found is None:
        submissions.insert_submission(session, request, retry_count)
        return False
    submissions.note_retry(session, found, retry_count)
    return True


def test_endpoint(project_id: str, endpoint_id: str, event_type: EventType) -> EndpointTest:
    """Sends a sample event and returns the status code of the response.

    The event is not stored and not sent again.

    Raises:
        NotFound: The project has no such endpoint.
        BadRequest: There was no response.
        TooManyRequests: Too many endpoints are being tested.
    """
    with transaction() as session:
        row = get_endpoint(session, project_id, endpoint_id)
        secrets = deliveries.active_secrets(row, deliveries.server_time(session))
    kind = "batch_" if event_type.startswith("batch.") else "ftjob-"
    message = Message.of(
        new_id("evt_test_"),
        event_type,
        {"id": f"{kind}sample"},
        datetime.now(UTC),
    )
    if not TESTS.acquire(blocking=False):
        raise TooManyRequests("other webhook endpoints are being tested; try again in a moment")
    try:
        answer = asyncio.run(send(webhook_guard(), row.url, message, secrets))
    finally:
        TESTS.release()
    if answer.status_code is None:
        raise BadRequest(
            f"the webhook endpoint cannot be reached: {answer.error}", "endpoint_unreachable", "url"
        )
    return EndpointTest(
        webhook_endpoint_id=row.id, event_type=event_type, status_code=answer.status_code
    )


def replay_delivery(project_id: str, endpoint_id: str, delivery_id: str) -> DeliveryObject:
    """Sends a delivery again, also if it has succeeded before.

    Raises NotFound, and Conflict if the endpoint is disabled.
    """
    with transaction() as session:
        row = get_endpoint(session, project_id, endpoint_id, lock=True)
        if row.disabled_at is not None:
            raise Conflict(
                "the webhook endpoint is disabled; enable it first with the field `enabled`",
                param="webhook_endpoint_id",
            )
        found = deliveries.replay(session, row.id, delivery_id)
        if found is None:
            raise NotFound(f"the delivery {delivery_id!r} does not exist", param="delivery_id")
        return DeliveryObject.of(*found)
