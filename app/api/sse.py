"""Server-sent events of a job. They have no ids, so that the `openai` client can read them."""

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
PING = b": ping\n"  # one newline: with two, the openai client would report an empty event
BATCH = 200
# Number of threads for all streams together; the other threads stay free for requests.
READERS = anyio.CapacityLimiter(8)


def start_after(job_id: str, after: str | None) -> int:
    """Returns the sequence number of the event with the id `after`; 0 if `after` is None.

    Raises BadRequest if the job has no such event.
    """
    if after is None:
        return 0
    with transaction() as session:
        seq = jobs.seq_of_event(session, job_id, after)
    if seq is None:
        raise BadRequest(f"the job has no event {after!r}", param="after")
    return seq


async def stream_events(job_id: str, seq: int) -> AsyncIterator[bytes]:
    """Yields all events after `seq` as they happen, until the job has ended, and then [DONE].

    Yields a comment after each PING_SECONDS without an event, which keeps the connection open.
    """
    silent_seconds = 0.0
    while True:
        try:
            events, has_ended = await anyio.to_thread.run_sync(
                _read_events, job_id, seq, limiter=READERS
            )
        except (DatabaseUnavailable, PoolExhausted) as fault:
            log.warning("events_delayed", reason=type(fault).__name__)
            events, has_ended = [], False  # the stream continues after a restart of the database
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


def _read_events(job_id: str, seq: int) -> tuple[list[Event], bool]:
    with transaction() as session:
        # Read the status first. A job's last event is committed together with its last status, so
        # all events are read below if the job has ended.
        status = jobs.status_of(session, job_id)
        return list(
            jobs.events_since(session, job_id, seq, limit=BATCH)
        ), status is None or status in TERMINAL


def _frame(event: Event) -> bytes:
    return f"event: {event.type}\ndata: {EventObject.of(event).model_dump_json()}\n\n".encode()
