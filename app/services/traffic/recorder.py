"""Stores completions after they have been answered, without delaying the answers.

A finished answer is put into a bounded queue. The spool thread writes queued records to the spool
and syncs them. The load thread inserts them into the database in batches. An answer is stored when
its row is committed. A record in the spool survives a kill of the process, and is inserted later.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import orjson
import structlog
from prometheus_client import Counter, Gauge

from app.auth import Principal
from app.contracts.generation import Delta, Done
from app.crash_points import crash_point
from app.schemas.answers import Answer, ChatAnswer
from app.schemas.completions import ChatBody
from app.services.traffic.spool import Spool, SpoolFull
from app.services.traffic.spool_loader import SpoolLoader
from app.settings import Settings

log = structlog.get_logger(__name__)
dropped = Counter(
    "stillhouse_stored_completions_dropped", "Completions that were not stored", ["reason"]
)
DROP_REASONS: Final = ("invalid", "queue_full", "spool_error", "spool_full", "too_large")
for _reason in DROP_REASONS:  # `rate` misses the first increment of a series that begins with it
    dropped.labels(_reason)
waiting_bytes = Gauge(
    "stillhouse_stored_completions_waiting_bytes",
    "Size of the completions that wait to be inserted",
)

MAX_QUEUED: Final = 1024  # answers that wait for the spool thread
MAX_QUEUED_BYTES: Final = 64 * 2**20
MAX_SPOOL_BYTES: Final = 2**30
GATHER_SECONDS: Final = 0.02  # the spool thread waits this long, so that one sync serves many
STOP_SECONDS: Final = 10.0  # longest wait at shutdown for the database
LOGPROB_BYTES: Final = 80  # estimate of a log-probability in JSON
LOG_SECONDS: Final = 10.0  # between two warnings about dropped completions


@dataclass(frozen=True)
class FinishedAnswer:
    """A complete answer that waits to be spooled.

    completion: The JSON of the answer in parts, or the answer to serialise.
    """

    principal: Principal
    request_id: str
    body: ChatBody
    answer: Answer
    completion: list[bytes] | None
    num_bytes: int
    created_at: float
    latency_seconds: float

    def record(self) -> bytes:
        """Returns the record that `app.db.traffic.completions.insert_records` takes."""
        body = self.body.model_dump(mode="json", exclude_unset=True, by_alias=True)
        messages = orjson.dumps(body.pop("messages"))
        parts = self.answer.whole() if self.completion is None else self.completion
        completion = b"".join(parts)
        metadata = body.pop("metadata", None) or {}
        request = orjson.dumps(body)
        prompt_tokens, _, completion_tokens = self.answer.num_tokens
        return orjson.dumps(
            {
                "id": self.answer.id,
                "project_id": self.principal.project_id,
                "key_id": self.principal.key_id,
                "model": self.answer.model,
                "metadata": metadata,
                "request_id": self.request_id,
                "request": request.decode(),
                "messages": messages.decode(),
                "completion": completion.decode(),
                "bytes": len(request) + len(messages) + len(completion),
                "latency_seconds": self.latency_seconds,
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
                "created_at": self.created_at,
            }
        )


class Recording:
    """One answer that will be stored. `add` collects the replies of a streamed answer.

    Nothing is stored unless `finish` is called, so an answer that failed or was aborted is not.
    """

    def __init__(
        self,
        recorder: "Recorder",
        principal: Principal,
        request_id: str,
        *,
        body: ChatBody,
        answer: ChatAnswer,
        request_bytes: int,
    ) -> None:
        self._recorder = recorder
        self._principal = principal
        self._request_id = request_id
        self._body = body
        self._num_bytes = request_bytes
        self._answer = answer
        self._kept: ChatAnswer | None = None  # the same answer, with the text of its stream
        self._created_at = time.time()
        self._began = time.perf_counter()

    def add(self, replies: list[tuple[int, Delta | Done]]) -> None:
        """Collects replies of a streamed answer, whose text the answer itself does not keep."""
        if self._kept is None:
            self._kept = ChatAnswer(self._answer.id, self._body, created=self._answer.created)
            self._kept.model = self._answer.model
        for _, reply in replies:
            if isinstance(reply, Delta):
                self._num_bytes += len(reply.text)
                self._num_bytes += sum(len(call.arguments) for call in reply.tool_calls)
                if reply.logprobs is not None:
                    self._num_bytes += reply.num_entries * LOGPROB_BYTES
        if self._num_bytes <= self._recorder.max_bytes:
            self._kept.add(replies)

    def finish(self, completion: list[bytes] | None = None) -> None:
        """Puts the answer into the queue.

        completion: The JSON of the answer if it was not streamed.
        """
        self._num_bytes += sum(map(len, completion or ()))
        finished = FinishedAnswer(
            self._principal,
            self._request_id,
            self._body,
            self._kept or self._answer,
            completion,
            self._num_bytes,
            self._created_at,
            time.perf_counter() - self._began,
        )
        self._recorder.put(finished)


class Recorder:
    """Queue and threads of one API process that store its answers."""

    def __init__(self, settings: Settings) -> None:
        self.max_bytes = settings.max_stored_bytes
        self.num_dropped = 0
        self._default_projects = frozenset(settings.store_projects.replace(",", " ").split())
        self._spool = Spool(settings.data_dir.resolve() / "spool", MAX_SPOOL_BYTES)
        self._loader = SpoolLoader(self._spool, self.count_dropped)
        self._queue: deque[FinishedAnswer] = deque()
        self._num_queued_bytes = 0
        self._guard = threading.Lock()
        self._has_work = threading.Event()
        self._is_stopping = threading.Event()
        self._warned_at = -LOG_SECONDS
        self._threads = [
            threading.Thread(target=_guarded(self._spool_queued), name="spool", daemon=True),
            threading.Thread(target=_guarded(self._load_spooled), name="load", daemon=True),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Spools all queued answers, and inserts them if the database answers in time."""
        self._is_stopping.set()
        self._has_work.set()
        for thread in self._threads:
            thread.join(STOP_SECONDS)

    def begin(
        self,
        principal: Principal,
        request_id: str,
        body: ChatBody,
        answer: ChatAnswer,
        *,
        request_bytes: int,
    ) -> Recording | None:
        """Returns a recording of the answer to this request, or None if it is not to be stored."""
        is_default = not self._default_projects.isdisjoint({principal.project_id, "*"})
        if body.store is False or (body.store is None and not is_default):
            return None
        return Recording(
            self, principal, request_id, body=body, answer=answer, request_bytes=request_bytes
        )

    def put(self, finished: FinishedAnswer) -> None:
        """Queues an answer, or drops it if it is too large or the queue is full. Never waits."""
        if finished.num_bytes > self.max_bytes:
            self.count_dropped("too_large")
            return
        with self._guard:
            num_bytes = self._num_queued_bytes + finished.num_bytes
            is_full = len(self._queue) >= MAX_QUEUED or num_bytes > MAX_QUEUED_BYTES
            if not is_full:
                self._queue.append(finished)
                self._num_queued_bytes = num_bytes
        if is_full:
            self.count_dropped("queue_full")
        else:
            self._has_work.set()

    def note_metrics(self) -> None:
        """Sets the gauge of the completions that wait to be inserted."""
        waiting_bytes.set(self._num_queued_bytes + self._spool.num_waiting_bytes)

    def count_dropped(self, reason: str, count: int = 1) -> None:
        """Counts answers that are not stored, and logs a warning at most every 10 seconds."""
        dropped.labels(reason).inc(count)
        with self._guard:
            self.num_dropped += count
            is_due = time.monotonic() - self._warned_at >= LOG_SECONDS
            if is_due:
                self._warned_at = time.monotonic()
        if is_due:
            log.warning("completion_not_stored", reason=reason, num_dropped=self.num_dropped)

    def _spool_queued(self) -> None:
        while not self._is_stopping.is_set():
            self._has_work.wait()
            self._has_work.clear()
            self._is_stopping.wait(GATHER_SECONDS)
            self._spool_all()
        self._spool_all()
        self._spool.close()
        self._loader.close()

    def _spool_all(self) -> None:
        lines = []
        while self._queue:
            with self._guard:
                finished = self._queue.popleft()
                self._num_queued_bytes -= finished.num_bytes
            try:
                line = finished.record()
            except Exception:  # a record that cannot be written must not stop the others
                log.exception("completion_not_serialised", id=finished.answer.id)
                self.count_dropped("invalid")
                continue
            if len(line) > self.max_bytes:
                self.count_dropped("too_large")
                continue
            lines.append(line)
            time.sleep(0)  # gives the GIL to the event loop
        if not lines:
            return
        try:
            self._spool.append(lines)
        except SpoolFull:
            self.count_dropped("spool_full", len(lines))
        except OSError:
            log.exception("spool_not_written")
            self.count_dropped("spool_error", len(lines))
        else:
            crash_point("traffic.spooled")
            self._loader.wake_up()

    def _load_spooled(self) -> None:
        self._loader.run()


def _guarded(work: Callable[[], None]) -> Callable[[], None]:
    """Returns the function with a log entry for an error that ends its thread."""

    def run() -> None:
        """Runs the work."""
        try:
            work()
        except Exception:
            log.exception("traffic_thread_failed")

    return run
