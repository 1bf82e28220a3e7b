"""Threads that tokenise prompts, so that no stream stands still while a long prompt is read."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import NamedTuple

import structlog

from app.contracts.messages import GenerateRequest
from worker.serve.decoding.fair_queue import FairQueue
from worker.serve.errors import ServeError

log = structlog.get_logger()

Tokens = tuple[int, ...]
NUM_THREADS = 2  # a tenant has one at most


class Tokenised(NamedTuple):
    """A request, with the tokens of its prompt or the reason why there are none."""

    request: GenerateRequest
    result: Tokens | ServeError


@dataclass(frozen=True, eq=False)
class _Job:
    request: GenerateRequest
    tokenise: Callable[[GenerateRequest], Tokens]

    @property
    def size(self) -> int:
        """Characters or tokens of the prompt."""
        request = self.request
        if request.messages is not None:
            return sum(len(message.content) for message in request.messages)
        return len(request.tokens if request.tokens is not None else request.text or "")


class PromptThreads:
    """Thread pool that tokenises prompts, so that a long prompt does not delay the decode steps of other requests.

    The order is fair among tenants; the prompts of one tenant are tokenised one after the other.
    All methods may be called from any thread. `ring` is called when a result can be taken.
    """

    def __init__(self, wake_up: Callable[[], None]) -> None:
        self._wake_up = wake_up
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="tokenise")
        self._lock = threading.Lock()  # guards the two below
        self._waiting: FairQueue[_Job] = FairQueue(lambda job: job.request.tenant, max_running=1)
        self._num_free = NUM_THREADS
        self._done: SimpleQueue[Tokenised] = SimpleQueue()

    def add(self, request: GenerateRequest, tokenise: Callable[[GenerateRequest], Tokens]) -> None:
        """Queues a request; `tokenise` returns its tokens or raises ServeError, in another thread."""
        with self._lock:
            self._waiting.add(_Job(request, tokenise))
            self._start()

    def cancel(self, request_id: str) -> None:
        """Forgets a request that has not begun; of one that has, the result still comes."""
        with self._lock:
            self._waiting.remove(lambda job: job.request.id == request_id)

    def has_result(self) -> bool:
        return not self._done.empty()

    def take(self) -> list[Tokenised]:
        """Returns the results since the last call."""
        return [self._done.get() for _ in range(self._done.qsize())]

    def close(self) -> None:
        """Forgets what has not begun."""
        with self._lock:
            self._waiting.remove(lambda _: True)
            self._pool.shutdown(wait=False)

    def _start(self) -> None:
        while self._num_free and (job := self._waiting.peek()) is not None:
            self._waiting.take(job.size)
            self._num_free -= 1
            self._pool.submit(self._run, job)

    def _run(self, job: _Job) -> None:
        result = _tokens_or_error(job)
        with self._lock:
            self._done.put(Tokenised(job.request, result))
            self._waiting.finish(job)
            self._num_free += 1
            self._start()
        self._wake_up()


def _tokens_or_error(job: _Job) -> Tokens | ServeError:
    try:
        return job.tokenise(job.request)
    except ServeError as error:
        return error
    except (
        BaseException
    ) as error:  # a panic of a Rust library is no Exception; it ends this request only
        log.error("request_refused", request=job.request.id, exc_info=error)
        return ServeError("the engine could not take this request; its log has the reason")
