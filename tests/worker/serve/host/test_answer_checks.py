"""The end of an answer is held back until the answer has been validated."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.contracts.generation import Delta, Done, Failure, GenerateRequest, Grammar, Reply
from worker.serve.errors import InvalidAnswer
from worker.serve.grammars.check_process import ANSWER_CHECKER
from worker.serve.host.answer_checks import AnswerChecks
from worker.serve.host.model_host import ModelHost

GRAMMAR = Grammar(kind="json_schema", text=json.dumps({"type": "integer"}))
DONE = Done(id="r", prompt_tokens=1, completion_tokens=2)
Make = Callable[..., GenerateRequest]


def delta(text: str, choice: int = 0, *, is_last: bool = True) -> Delta:
    return Delta(id="r", choice=choice, text=text, finish_reason="stop" if is_last else None)


@pytest.fixture
def woken() -> threading.Semaphore:
    return threading.Semaphore(0)


@pytest.fixture
def checks(woken: threading.Semaphore) -> Iterator[AnswerChecks]:
    answer_checks = AnswerChecks(woken.release)
    yield answer_checks
    answer_checks.close()


def test_valid_choices_are_released_and_done_comes_last(
    checks: AnswerChecks, woken: threading.Semaphore, make_request: Make
) -> None:
    request = make_request(grammar=GRAMMAR, n=2)
    first = delta("1", is_last=False)
    assert checks.pass_on(request, first) == [first]
    assert checks.pass_on(request, delta("2")) == []
    assert checks.pass_on(request, delta("3", 1)) == []
    assert checks.pass_on(request, DONE) == []
    for _ in range(2):
        assert woken.acquire(timeout=30)
    released = [reply for checked in checks.take() for reply in checked.replies]
    assert released == [delta("2"), delta("3", 1), DONE]


def test_an_invalid_answer_ends_its_request_with_an_error(
    checks: AnswerChecks, woken: threading.Semaphore, make_request: Make
) -> None:
    request = make_request(grammar=GRAMMAR)
    assert checks.pass_on(request, delta('"x"')) == []
    assert checks.pass_on(request, DONE) == []
    assert woken.acquire(timeout=30)
    (checked,) = checks.take()
    assert checked.replies == []
    assert isinstance(checked.error, InvalidAnswer)


def test_an_answer_that_a_stop_token_has_cut_is_accepted(
    checks: AnswerChecks, woken: threading.Semaphore, make_request: Make
) -> None:
    grammar = Grammar(kind="json_schema", text=json.dumps({"type": "array"}))
    request = make_request(grammar=grammar, stop_token_ids=(7,))
    assert checks.pass_on(request, delta("[1")) == []
    assert checks.pass_on(request, DONE) == []
    assert woken.acquire(timeout=30)
    (checked,) = checks.take()
    assert (checked.replies, checked.error) == ([delta("[1"), DONE], None)


def test_a_cancelled_request_gets_nothing(
    checks: AnswerChecks, woken: threading.Semaphore, make_request: Make
) -> None:
    request = make_request(grammar=GRAMMAR)
    checks.pass_on(request, delta("1"))
    checks.forget("r")
    assert woken.acquire(timeout=30)
    assert checks.take() == []


def test_other_requests_are_not_held_back(checks: AnswerChecks, make_request: Make) -> None:
    regex = Grammar(kind="regex", text="a")
    for request in (make_request(), make_request(grammar=regex)):
        assert checks.pass_on(request, delta("a")) == [delta("a")]
        assert checks.pass_on(request, DONE) == [DONE]


def test_a_host_fails_a_request_with_an_invalid_answer_and_ends_its_other_choices(
    make_request: Make, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(grammar: Grammar, text: str, *, may_be_cut: bool) -> None:
        raise InvalidAnswer("the answer does not match the schema: test")

    monkeypatch.setattr(ANSWER_CHECKER, "demand_valid", refuse)
    host = ModelHost(
        resident_bytes=10_000_000, loader=lambda _: tiny_llama_dir, max_context_tokens=256
    )
    # The choices have answers of different lengths.
    grammar = Grammar(kind="json_schema", text=json.dumps({"enum": ["a", "b" * 100]}))
    host.submit(make_request(grammar=grammar, n=6, max_tokens=200, temperature=1.0, seed=1))
    replies: list[Reply] = []
    deadline = time.monotonic() + 240
    while host.has_work():
        assert time.monotonic() < deadline
        host.wait_for_work(0.02)
        replies += [reply for _, reply in host.step_all()]
    host.close()
    *deltas, failure = replies
    assert isinstance(failure, Failure)
    assert failure.code == "invalid_answer"
    assert all(isinstance(d, Delta) and d.finish_reason is None for d in deltas)
