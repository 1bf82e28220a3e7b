"""Holds back the end of each answer with a JSON Schema until the answer has been validated."""

from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import NamedTuple

import structlog

from app.contracts.generation import Delta, Done, GenerateRequest, Grammar, Reply
from worker.serve.errors import ServeError
from worker.serve.grammars.check_process import ANSWER_CHECKER

log = structlog.get_logger()


class Checked(NamedTuple):
    """A request with a choice that was validated: the replies that can now be sent, or the error."""

    request: GenerateRequest
    replies: list[Reply]
    error: ServeError | None


class _Result(NamedTuple):
    request: GenerateRequest
    choice: int
    error: ServeError | None


@dataclass
class _Open:
    """Answer to one request. The last delta of a choice is held back while it is validated."""

    request: GenerateRequest
    texts: defaultdict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    held: dict[int, Delta] = field(default_factory=dict)
    done: Done | None = None


class AnswerChecks:
    """Validation of complete answers in another thread.

    One thread calls all methods. `wake_up` is called when a result can be taken.
    """

    def __init__(self, wake_up: Callable[[], None]) -> None:
        self._wake_up = wake_up
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="validate")
        self._open: dict[str, _Open] = {}
        self._results: SimpleQueue[_Result] = SimpleQueue()

    def pass_on(self, request: GenerateRequest, reply: Reply) -> list[Reply]:
        """Returns the replies that can be sent at once."""
        grammar = request.sampling.grammar
        if grammar is None or grammar.kind != "json_schema":
            return [reply]
        answer = self._open.setdefault(request.id, _Open(request))
        if isinstance(reply, Delta):
            answer.texts[reply.choice].append(reply.text)
            if reply.finish_reason != "stop":
                return [reply]
            text = "".join(answer.texts.pop(reply.choice))
            answer.held[reply.choice] = reply
            self._pool.submit(self._validate, request, grammar, reply.choice, text)
            return []
        if isinstance(reply, Done) and answer.held:
            answer.done = reply
            return []
        self._open.pop(request.id, None)
        return [reply]

    def forget(self, request_id: str) -> None:
        """Forgets a request that has failed or was cancelled. Ignores unknown ids."""
        self._open.pop(request_id, None)

    def has_result(self) -> bool:
        return not self._results.empty()

    def take(self) -> list[Checked]:
        """Returns the requests with a validated choice since the last call."""
        return [
            checked
            for _ in range(self._results.qsize())
            if (checked := self._release(self._results.get())) is not None
        ]

    def close(self) -> None:
        """Ends the thread, without the validations that have not started."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _release(self, result: _Result) -> Checked | None:
        request = result.request
        answer = self._open.get(request.id)
        if answer is None or answer.request is not request:
            return None  # it has failed or was cancelled
        if result.error is not None:
            del self._open[request.id]
            return Checked(request, [], result.error)
        replies: list[Reply] = [answer.held.pop(result.choice)]
        if not answer.held and answer.done is not None:
            del self._open[request.id]
            replies.append(answer.done)
        return Checked(request, replies, None)

    def _validate(self, request: GenerateRequest, grammar: Grammar, choice: int, text: str) -> None:
        error: ServeError | None = None
        may_be_cut = bool(request.sampling.stop or request.sampling.stop_token_ids)
        try:
            ANSWER_CHECKER.demand_valid(grammar, text, may_be_cut=may_be_cut)
        except ServeError as invalid:
            error = invalid
        except Exception as failed:  # any other error must end the request too
            log.error("validation_failed", request=request.id, exc_info=failed)
            error = ServeError("the answer could not be validated against its schema; retry")
        self._results.put(_Result(request, choice, error))
        self._wake_up()
