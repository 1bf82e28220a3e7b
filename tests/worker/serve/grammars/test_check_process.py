"""Grammars and answers are checked in a child process that cannot hurt the worker."""

import json
import signal
import threading
from collections.abc import Iterator

import pytest

from app.contracts.generation import Grammar
from worker.serve.errors import InvalidAnswer, InvalidGrammar
from worker.serve.grammars.check_process import CheckProcess


def schema(text: object) -> Grammar:
    return Grammar(kind="json_schema", text=json.dumps(text), param="tools")


@pytest.fixture(scope="module")
def checker() -> Iterator[CheckProcess]:
    process = CheckProcess()
    yield process
    process.close()


def test_a_grammar_that_cannot_be_compiled_is_refused(checker: CheckProcess) -> None:
    checker.demand_compilable(schema({"type": "object"}))
    with pytest.raises(InvalidGrammar, match="oneOf") as caught:
        checker.demand_compilable(schema({"oneOf": [{"type": "string"}, {"minLength": 1}]}))
    assert caught.value.param == "tools"


def test_a_grammar_that_takes_too_long_is_refused_and_at_last_not_tried_again(
    checker: CheckProcess,
) -> None:
    patterns = [{"type": "string", "pattern": f"(a|b)*a(a|b){{{i}}}"} for i in range(10, 30)]
    hostile = schema({"allOf": patterns})
    for _ in range(2):  # with two attempts each
        with pytest.raises(InvalidGrammar, match="too long"):
            checker.demand_compilable(hostile)
        assert checker._process._child is None
    with pytest.raises(InvalidGrammar, match="too long"):
        checker.demand_compilable(hostile)
    assert checker._process._child is None, "the last attempt started a child"


def test_a_grammar_survives_the_death_of_a_child_that_has_another_cause(
    checker: CheckProcess,
) -> None:
    checker.start()
    child = checker._process._child
    assert child is not None
    child.send_signal(signal.SIGSTOP)  # so that it dies during the compilation
    killer = threading.Timer(0.5, child.kill)
    killer.start()
    checker.demand_compilable(schema({"type": "array"}))
    killer.join()
    assert child.returncode == -signal.SIGKILL


def test_an_accepted_grammar_needs_no_child(checker: CheckProcess) -> None:
    accepted = schema({"type": "boolean"})
    checker.demand_compilable(accepted)
    checker.close()
    checker.demand_compilable(accepted)
    assert checker._process._child is None


def test_a_deeply_nested_grammar_is_refused(checker: CheckProcess) -> None:
    text = '{"not":' * 100_000 + "{}" + "}" * 100_000
    with pytest.raises(InvalidGrammar, match="nested too deeply"):
        checker.demand_compilable(Grammar(kind="json_schema", text=text))


def test_a_deeply_nested_answer_is_refused_and_its_grammar_is_not(checker: CheckProcess) -> None:
    grammar = schema({})
    with pytest.raises(InvalidAnswer, match="nested too deeply"):
        checker.demand_valid(grammar, "[" * 100_000 + "]" * 100_000, may_be_cut=False)
    checker.demand_valid(grammar, "[]", may_be_cut=False)


def test_an_answer_that_violates_its_schema_is_refused(checker: CheckProcess) -> None:
    grammar = schema({"type": "object", "properties": {"a": {"type": "integer"}}})
    checker.demand_valid(grammar, '{"a":1}', may_be_cut=False)
    with pytest.raises(InvalidAnswer, match="integer"):
        checker.demand_valid(grammar, '{"a":"1"}', may_be_cut=True)
    with pytest.raises(InvalidAnswer, match="not valid JSON"):
        checker.demand_valid(grammar, '{"a":', may_be_cut=False)
    checker.demand_valid(grammar, '{"a":', may_be_cut=True)


def test_a_validation_that_takes_exponential_time_ends_with_its_child(
    checker: CheckProcess,
) -> None:
    branch = {"type": "object", "properties": {"a": {"$ref": "#"}}}
    hostile = schema(
        {
            "anyOf": [
                branch | {"required": ["b"]},
                branch | {"required": ["c"]},
                branch | {"maxProperties": 0},
            ]
        }
    )
    with pytest.raises(InvalidAnswer, match="too long"):
        checker.demand_valid(hostile, '{"a":' * 40 + "{}" + "}" * 40, may_be_cut=False)
    checker.demand_valid(hostile, "{}", may_be_cut=False)
