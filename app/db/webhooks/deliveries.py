"""Queries and changes of deliveries: claims, results of attempts, replays and pages.

A process claims due deliveries under a lease. The end of the lease is the time of the next attempt,
so a delivery whose process was killed becomes due again. Results are fenced by the lease token.

A transaction that locks both an endpoint and its deliveries locks the endpoint first.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import ColumnElement, case, delete, func, literal, select, true, update
from sqlalchemy.orm import Session

from app.db.pagination import Order, keyset_page
from app.db.schema.json_values import clean_text
from app.db.schema.table import Json
from app.db.schema.tables import lease_tokens
from app.db.schema.webhook_tables import WebhookDelivery, WebhookEndpoint, WebhookEvent

KEPT_ATTEMPTS: Final = 30
# Limits of the deliveries that one process attempts at the same time. One slow endpoint must not
# delay the others of its project, and the endpoints of one project must not delay other projects.
CLAIMS_PER_ENDPOINT: Final = 4
CLAIMS_PER_PROJECT: Final = 6
# More candidates than claims, because other processes may claim some of them first.
CANDIDATES_PER_CLAIM: Final = 4


@dataclass(frozen=True)
class ClaimedDelivery:
    """A delivery that this process may attempt, with everything that the request needs.

    secrets: Secrets that sign the request, the current one first.
    num_failures: Failed attempts since the schedule of retries began.
    """

    id: str
    lease_token: int
    claimed_at: datetime
    project_id: str
    endpoint_id: str
    url: str
    secrets: tuple[str, ...]
    event_id: str
    event_type: str
    event_data: Json
    event_created_at: datetime
    num_failures: int


@dataclass(frozen=True)
class AttemptResult:
    """Result of one attempt. `status_code` is None without a response, `error` after a success.

    attempted_at: Start of the attempt.
    """

    attempted_at: datetime
    duration_seconds: float
    status_code: int | None
    error: str | None


@dataclass(frozen=True)
class DisableRule:
    """Rule that disables an endpoint: so many failures in a row, over at least so many seconds."""

    num_failures: int
    seconds: float


def server_time(session: Session) -> datetime:
    """Returns the time at the database server."""
    return session.scalars(select(func.now())).one()


def claim(
    session: Session,
    now: datetime,
    *,
    lease_seconds: float,
    most: int,
    in_flight: Collection[ClaimedDelivery] = (),
) -> list[ClaimedDelivery]:
    """Claims up to `most` due deliveries, the longest due ones first.

    in_flight: Deliveries that this process attempts now. They count towards the limits of their
        endpoints and projects.
    """
    ids = _lock_due(session, _find_due(session, now, most, in_flight), now, most)
    if not ids:
        return []
    leased = update(WebhookDelivery).where(WebhookDelivery.id.in_(ids))
    leased = leased.values(
        lease_token=lease_tokens.next_value(),
        next_attempt_at=now + timedelta(seconds=lease_seconds),
    )
    session.execute(leased.execution_options(synchronize_session=False))
    query = (
        select(WebhookDelivery, WebhookEndpoint, WebhookEvent)
        .join(WebhookEndpoint, WebhookEndpoint.id == WebhookDelivery.endpoint_id)
        .join(WebhookEvent, WebhookEvent.id == WebhookDelivery.event_id)
        .where(WebhookDelivery.id.in_(ids))
        .order_by(WebhookEvent.created_at, WebhookDelivery.id)
    )
    rows = session.execute(query.execution_options(populate_existing=True))
    return [_claimed(now, *row) for row in rows]


def _find_due(
    session: Session, now: datetime, most: int, in_flight: Collection[ClaimedDelivery]
) -> list[str]:
    """Returns the ids of due deliveries, the longest due ones first, without locking them."""
    per_endpoint = Counter(delivery.endpoint_id for delivery in in_flight)
    busy = [name for name, count in per_endpoint.items() if count >= CLAIMS_PER_ENDPOINT]
    due = (
        select(WebhookDelivery.id, WebhookDelivery.next_attempt_at)
        .where(
            WebhookDelivery.endpoint_id == WebhookEndpoint.id,
            WebhookDelivery.status == "pending",
            WebhookDelivery.next_attempt_at <= now,
        )
        .order_by(WebhookDelivery.next_attempt_at)
        .limit(CLAIMS_PER_ENDPOINT)
        .correlate(WebhookEndpoint)
        .lateral()
    )
    rank = func.row_number().over(
        partition_by=WebhookEndpoint.project_id, order_by=(due.c.next_attempt_at, due.c.id)
    )
    ranked = (
        select(due.c.id, due.c.next_attempt_at, WebhookEndpoint.project_id, rank.label("rank"))
        .select_from(WebhookEndpoint)
        .join(due, true())
        .where(WebhookEndpoint.disabled_at.is_(None), WebhookEndpoint.id.not_in(busy))
        .subquery()
    )
    per_project = Counter(delivery.project_id for delivery in in_flight)
    num_in_flight: ColumnElement[int] = literal(0)
    if per_project:
        num_in_flight = case(dict(per_project), value=ranked.c.project_id, else_=0)
    query = (
        select(ranked.c.id)
        .where(ranked.c.rank + num_in_flight <= CLAIMS_PER_PROJECT)
        .order_by(ranked.c.next_attempt_at)
        .limit(CANDIDATES_PER_CLAIM * most)
    )
    return list(session.scalars(query))


def _lock_due(session: Session, ids: Collection[str], now: datetime, most: int) -> list[str]:
    """Locks up to `most` of these deliveries, and returns the ids of those that are still due.

    Skips deliveries that another process locks. Only the deliveries that are returned are locked,
    so other processes can claim the rest at the same time.
    """
    query = (
        select(WebhookDelivery.id)
        .where(
            WebhookDelivery.id.in_(ids),
            WebhookDelivery.status == "pending",
            WebhookDelivery.next_attempt_at <= now,
        )
        .order_by(WebhookDelivery.next_attempt_at)
        .limit(most)
        .with_for_update(skip_locked=True)
    )
    return list(session.scalars(query)) if ids else []


def _claimed(
    now: datetime, delivery: WebhookDelivery, endpoint: WebhookEndpoint, event: WebhookEvent
) -> ClaimedDelivery:
    assert delivery.lease_token is not None
    return ClaimedDelivery(
        id=delivery.id,
        lease_token=delivery.lease_token,
        claimed_at=now,
        project_id=endpoint.project_id,
        endpoint_id=endpoint.id,
        url=endpoint.url,
        secrets=active_secrets(endpoint, now),
        event_id=event.id,
        event_type=event.type,
        event_data=event.data,
        event_created_at=event.created_at,
        num_failures=delivery.num_failures,
    )


def active_secrets(endpoint: WebhookEndpoint, now: datetime) -> tuple[str, ...]:
    """Returns the secrets that sign a request at this time, the current one first."""
    expires_at = endpoint.previous_secret_expires_at
    if endpoint.previous_secret is None or expires_at is None or expires_at <= now:
        return (endpoint.secret,)
    return endpoint.secret, endpoint.previous_secret


def record_success(session: Session, claimed: ClaimedDelivery, result: AttemptResult) -> bool:
    """Ends a delivery as succeeded. Returns False, without changes, if the lease is lost."""
    endpoint = _lock_endpoint(session, claimed.endpoint_id)
    delivery = _lock_claimed(session, claimed)
    if endpoint is None or delivery is None:
        return False
    _log_attempt(delivery, result)
    delivery.status = "succeeded"
    delivery.next_attempt_at = None
    if endpoint.num_failures and endpoint.url == claimed.url:
        endpoint.num_failures = 0
        endpoint.failing_since = None
    session.flush()
    return True


def record_failure(
    session: Session,
    claimed: ClaimedDelivery,
    result: AttemptResult,
    *,
    retry_at: datetime | None,
    disable_rule: DisableRule,
    disable_reason: str | None = None,
) -> str | None:
    """Records a failed attempt. Returns the reason if the endpoint is disabled because of it.

    Changes nothing if the lease is lost. If the URL of the endpoint was changed during the attempt,
    the failure does not count for the endpoint.

    retry_at: Time of the next attempt; None if there are no more, and the delivery has failed.
    disable_reason: Reason to disable the endpoint at once. Otherwise the rule decides.
    """
    endpoint = _lock_endpoint(session, claimed.endpoint_id)
    delivery = _lock_claimed(session, claimed)
    if endpoint is None or delivery is None:
        return None
    _log_attempt(delivery, result)
    delivery.num_failures += 1
    delivery.status = "failed" if retry_at is None else "pending"
    delivery.next_attempt_at = retry_at
    if endpoint.url != claimed.url:
        session.flush()
        return None
    endpoint.num_failures += 1
    if endpoint.failing_since is None:
        endpoint.failing_since = result.attempted_at
    failing_seconds = (result.attempted_at - endpoint.failing_since).total_seconds()
    is_failing_long = (
        endpoint.num_failures >= disable_rule.num_failures
        and failing_seconds >= disable_rule.seconds
    )
    if disable_reason is None and is_failing_long:
        disable_reason = (
            f"{endpoint.num_failures} attempts in {failing_seconds / 86_400:.1f} days have failed, "
            f"the last one with: {result.error}"
        )
    if endpoint.disabled_at is not None:  # another attempt or a request has disabled it before
        disable_reason = None
    if disable_reason is not None:
        endpoint.disabled_at = result.attempted_at
        endpoint.disabled_reason = clean_text(disable_reason)
    session.flush()
    return disable_reason


def release(session: Session, claimed: Collection[ClaimedDelivery], now: datetime) -> None:
    """Ends leases without a result, so that another process can attempt the deliveries at once."""
    freed = update(WebhookDelivery).where(
        WebhookDelivery.lease_token.in_([delivery.lease_token for delivery in claimed])
    )
    freed = freed.values(lease_token=None, next_attempt_at=now)
    session.execute(freed.execution_options(synchronize_session=False))


def page_deliveries(
    session: Session,
    endpoint_id: str,
    *,
    status: str | None,
    after: str | None,
    limit: int,
    order: Order,
) -> tuple[list[tuple[WebhookDelivery, WebhookEvent]], bool]:
    """Returns a page of the endpoint's deliveries with their events, and whether more follow.

    Raises UnknownCursor.
    """
    query = select(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint_id)
    if status is not None:
        query = query.where(WebhookDelivery.status == status)
    rows, has_more = keyset_page(
        session, query, WebhookDelivery, after=after, limit=limit, order=order
    )
    wanted = select(WebhookEvent).where(WebhookEvent.id.in_([row.event_id for row in rows]))
    events = {event.id: event for event in session.scalars(wanted)}
    # The retention may have deleted an event, with its deliveries, between the two queries.
    return [(row, events[row.event_id]) for row in rows if row.event_id in events], has_more


def replay(
    session: Session, endpoint_id: str, delivery_id: str
) -> tuple[WebhookDelivery, WebhookEvent] | None:
    """Makes a delivery due at once, with a new schedule of retries. Returns None if it is unknown.

    The result of an attempt that is being made is ignored.
    """
    query = select(WebhookDelivery).where(
        WebhookDelivery.id == delivery_id, WebhookDelivery.endpoint_id == endpoint_id
    )
    delivery = session.scalars(query.with_for_update()).one_or_none()
    if delivery is None:
        return None
    now = server_time(session)
    delivery.status = "pending"
    delivery.num_failures = 0
    delivery.next_attempt_at = now
    delivery.lease_token = None
    session.flush()
    return delivery, session.get_one(WebhookEvent, delivery.event_id)


def forget_old_events(session: Session, max_age_seconds: float, most: int) -> int:
    """Deletes up to `most` events above this age, with their deliveries, and returns how many."""
    old = select(WebhookEvent.id).where(
        WebhookEvent.created_at < func.now() - timedelta(seconds=max_age_seconds)
    )
    old = old.order_by(WebhookEvent.created_at).limit(most).with_for_update(skip_locked=True)
    gone = delete(WebhookEvent).where(WebhookEvent.id.in_(old))
    gone = gone.execution_options(synchronize_session=False)
    return len(session.scalars(gone.returning(WebhookEvent.id)).all())


def _lock_endpoint(session: Session, endpoint_id: str) -> WebhookEndpoint | None:
    query = select(WebhookEndpoint).where(WebhookEndpoint.id == endpoint_id)
    query = query.with_for_update(key_share=True)
    return session.scalars(query, execution_options={"populate_existing": True}).one_or_none()


def _lock_claimed(session: Session, claimed: ClaimedDelivery) -> WebhookDelivery | None:
    query = select(WebhookDelivery).where(
        WebhookDelivery.id == claimed.id, WebhookDelivery.lease_token == claimed.lease_token
    )
    query = query.with_for_update()
    return session.scalars(query, execution_options={"populate_existing": True}).one_or_none()


def _log_attempt(delivery: WebhookDelivery, result: AttemptResult) -> None:
    attempt = {
        "attempted_at": int(result.attempted_at.timestamp()),
        "duration_seconds": round(result.duration_seconds, 3),
        "status_code": result.status_code,
        "error": clean_text(result.error) if result.error is not None else None,
    }
    delivery.attempts = [*delivery.attempts, attempt][-KEPT_ATTEMPTS:]
    delivery.num_attempts += 1
    delivery.lease_token = None
