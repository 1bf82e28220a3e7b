"""Tokenises prompts in separate threads."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import NamedTuple

import structlog

from app.contracts.generation import GenerateRequest, Reply
from worker.serve.decoding.fair_queue import FairQueue
from worker.serve.errors import ServeError

log = structlog.get_logger()

Tokens = tuple[int, ...]
Replies = tuple[Reply, ...]
NUM_THREADS = 2  # one tenant uses at most one of them


class Tokenised(NamedTuple):
    """A request with the result of its tokenisation.

    It is the tokens of its prompt, the error that prevented them, or all replies to a request about
    the tokenizer.
    """

    request: GenerateRequest
    result: Tokens | Replies | ServeError


@dataclass(frozen=True, eq=False)
class _Job:
    request: GenerateRequest
    tokenise: Callable[[GenerateRequest], Tokens | Replies]

    @property
    def size(self) -> int:
        """Length of the prompt, in characters or in tokens."""
        request = self.request
        if request.messages is not None:
            tools = () if request.tool_use is None else request.tool_use.tools
            return sum(len(message.content or "") for message in request.messages) + sum(
                len(tool.parameters or "") for tool in tools
            )
        return len(request.tokens if request.tokens is not None else request.text or "")


class PromptThreads:
    """Thread pool that tokenises prompts, so that a long prompt does not delay other requests.

    The order is fair among tenants. The prompts of one tenant are tokenised one after the other.
    All methods may be called from any thread. `wake_up` is called when a result can be taken.
    """

    def __init__(self, wake_up: Callable[[], None]) -> None:
        self._wake_up = wake_up
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="tokenise")
        self._lock = threading.Lock()  # guards _waiting and _num_free
        self._waiting: FairQueue[_Job] = FairQueue(lambda job: job.request.tenant, max_running=1)
        self._num_free = NUM_THREADS
        self._done: SimpleQueue[Tokenised] = SimpleQueue()

    def add(
        self, request: GenerateRequest, tokenise: Callable[[GenerateRequest], Tokens | Replies]
    ) -> None:
        """Queues a request.

        `tokenise` is called in another thread. It returns the result or raises ServeError.
        """
        with self._lock:
            self._waiting.add(_Job(request, tokenise))
            self._start()

    def cancel(self, request_id: str) -> None:
        """Removes a request that has not started. A started request still gets its result."""
        with self._lock:
            self._waiting.remove(lambda job: job.request.id == request_id)

    def has_result(self) -> bool:
        return not self._done.empty()

    def take(self) -> list[Tokenised]:
        """Returns the results since the last call."""
        return [self._done.get() for _ in range(self._done.qsize())]

    def close(self) -> None:
        """Removes all requests that have not started, and ends the threads."""
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


def _tokens_or_error(job: _Job) -> Tokens | Replies | ServeError:
    try:
        return job.tokenise(job.request)
    except ServeError as error:
        return error
    # A panic of a Rust library is not an Exception. It must end this request only.
    except BaseException as error:
        log.error("request_refused", request=job.request.id, exc_info=error)
        return ServeError(
            "the engine could not process this request; the worker's log shows the reason"
        )
