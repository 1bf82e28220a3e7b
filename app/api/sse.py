"""A job's events as a stream: frames without ids, so that the `openai` client can read them."""

from collections.abc import AsyncIterator

import anyio.to_thread
import structlog

from app.contracts.messages import TERMINAL
from app.db import jobs
from app.db.schema.tables import Event
from app.db.session import DatabaseUnavailable, PoolExhausted, transaction
from app.errors import BadRequest
from app.schemas.jobs import EventObject

log = structlog.get_logger(__name__)

POLL_SECONDS = 0.5
PING_SECONDS = 10.0
PING = b": ping\n"  # one newline: with two, the SDK would take an empty event
BATCH = 200
LOOKS = anyio.CapacityLimiter(
    8
)  # however many streams there are, they leave threads to those who ask


def start_after(job_id: str, after: str | None) -> int:
    """The sequence number to stream from; 0 is the beginning. Raises BadRequest for an unknown event."""
    if after is None:
        return 0
    with transaction() as session:
        seq = jobs.seq_of_event(session, job_id, after)
    if seq is None:
        raise BadRequest(f"the job has no event {after!r}", param="after")
    return seq


async def stream_events(job_id: str, seq: int) -> AsyncIterator[bytes]:
    """Every event after `seq`, then those that come, until the job has ended; then [DONE]."""
    silent_seconds = 0.0
    while True:
        try:
            events, has_ended = await anyio.to_thread.run_sync(_look, job_id, seq, limiter=LOOKS)
        except (DatabaseUnavailable, PoolExhausted) as fault:
            log.warning("events_delayed", reason=type(fault).__name__)
            events, has_ended = [], False  # the stream outlives a restart of the database
        for event in events:
            seq, silent_seconds = event.seq, 0.0
            yield _frame(event)
        if has_ended and not events:
            yield b"data: [DONE]\n\n"
            return
        if len(events) < BATCH and not has_ended:
            await anyio.sleep(POLL_SECONDS)
            silent_seconds += POLL_SECONDS
            if silent_seconds >= PING_SECONDS:
                silent_seconds = 0.0
                yield PING


def _look(job_id: str, seq: int) -> tuple[list[Event], bool]:
    with transaction() as session:
        # The status first: a job's last event is written together with its last status.
        status = jobs.status_of(session, job_id)
        return list(
            jobs.events_since(session, job_id, seq, limit=BATCH)
        ), status is None or status in TERMINAL


def _frame(event: Event) -> bytes:
    return f"event: {event.type}\ndata: {EventObject.of(event).model_dump_json()}\n\n".encode()
