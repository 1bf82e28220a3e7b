"""Compiles grammars and validates answers in child processes, with limits of time and memory.

A grammar of a client is untrusted: it may take too long, use too much memory or crash a library. In
that case only the child process ends.

`python -m worker.serve.grammars.check_process` is the child process. It reads one JSON object per
line and writes one per line, until its input is closed.
"""

import atexit
import json
import signal
import sys
import threading
from collections import OrderedDict
from functools import lru_cache
from typing import Any, Final, TypeVar

from app.contracts.generation import Grammar
from worker.serve.errors import InvalidAnswer, InvalidGrammar
from worker.serve.line_process import LineProcess, limit_memory

COMPILE_SECONDS: Final = 1.0  # CPU time of one compilation
VALIDATE_SECONDS: Final = 0.25  # CPU time of one validation, for which other answers wait
MEMORY_BYTES: Final = 512 * 2**20  # in addition to what the child uses when it is ready
MAX_ATTEMPTS: Final = 2  # children per check: the death of a child may have another cause
MOST_ENDS: Final = 3  # children that a grammar may end before it is refused untried
MAX_REMEMBERED: Final = 256  # grammars that were accepted, and grammars that ended a child
MAX_VALIDATORS: Final = 64  # compiled schemas that a child keeps
Json = dict[str, Any]  # Any: JSON
Key = tuple[str, str]  # kind and text of a grammar
T = TypeVar("T")


class CheckProcess:
    """A child process that answers one line at a time.

    The child starts with the first line. All methods are thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = LineProcess("worker.serve.grammars.check_process")
        # A slow check holds `_lock`. This lock is for the results of earlier compilations only.
        self._results_lock = threading.Lock()
        self._accepted: OrderedDict[Key, None] = OrderedDict()
        self._num_ends: OrderedDict[Key, int] = OrderedDict()  # children that a grammar has ended

    def demand_compilable(self, grammar: Grammar) -> None:
        """Raises InvalidGrammar if a grammar cannot be compiled within the limits.

        Returns at once for a grammar that was accepted recently.
        """
        if self._was_accepted(grammar):
            return
        answer = self._ask(grammar, None)
        if answer is None:
            raise InvalidGrammar(
                "the grammar takes too long or too much memory to compile; use a simpler one"
            ).about(grammar)
        if answer["error"]:
            raise InvalidGrammar(f"the grammar cannot be enforced: {answer['error']}").about(
                grammar
            )
        with self._results_lock:
            self._num_ends.pop(_key(grammar), None)
            _remember(self._accepted, _key(grammar), None)

    def demand_valid(self, grammar: Grammar, text: str, *, may_be_cut: bool) -> None:
        """Raises InvalidAnswer if a complete answer does not match the JSON Schema of a grammar.

        With `may_be_cut`, text that is not valid JSON is accepted.
        """
        answer = self._ask(grammar, text)
        if answer is None:
            raise InvalidAnswer("the answer takes too long to validate; use a simpler schema")
        if answer["error"] and not (may_be_cut and answer["is_cut"]):
            raise InvalidAnswer(f"the answer does not match the schema: {answer['error']}")

    def start(self) -> None:
        """Starts the child process early, because it takes a while to be ready."""
        with self._lock:
            self._process.start()

    def close(self) -> None:
        """Ends the child process, after the line in progress."""
        with self._lock:
            self._process.close()

    def _ask(self, grammar: Grammar, text: str | None) -> Json | None:
        """Returns the answer of a child, or None if the check has ended its children.

        Only compilations count as ends of a grammar. A validation also depends on the answer.
        """
        message = {"kind": grammar.kind, "grammar": grammar.text, "text": text}
        for _ in range(MAX_ATTEMPTS):
            with self._lock:
                if text is None and self._has_ended_most(grammar):
                    return None
                answer = self._process.exchange(message)
                if answer is not None:
                    return answer
                if text is None:
                    self._count_end(grammar)
        return None

    def _was_accepted(self, grammar: Grammar) -> bool:
        with self._results_lock:
            is_known = _key(grammar) in self._accepted
            if is_known:
                self._accepted.move_to_end(_key(grammar))
            return is_known

    def _has_ended_most(self, grammar: Grammar) -> bool:
        with self._results_lock:
            return self._num_ends.get(_key(grammar), 0) >= MOST_ENDS

    def _count_end(self, grammar: Grammar) -> None:
        with self._results_lock:
            num_ends = self._num_ends.get(_key(grammar), 0) + 1
            _remember(self._num_ends, _key(grammar), num_ends)


def _key(grammar: Grammar) -> Key:
    return grammar.kind, grammar.text


def _remember(results: OrderedDict[Key, T], key: Key, value: T) -> None:
    results[key] = value
    results.move_to_end(key)
    if len(results) > MAX_REMEMBERED:
        results.popitem(last=False)


def serve() -> None:
    """Answers lines until the input is closed. A line that takes too long ends this process."""
    compile_error("json_schema", "{}")  # imports the libraries before the memory is limited
    validation_error("{}", "{}")
    limit_memory(MEMORY_BYTES)
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        is_compiling = asked["text"] is None
        seconds = COMPILE_SECONDS if is_compiling else VALIDATE_SECONDS
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        if is_compiling:
            answer: Json = {"error": compile_error(asked["kind"], asked["grammar"])}
        else:
            error, is_cut = validation_error(asked["grammar"], asked["text"])
            answer = {"error": error, "is_cut": is_cut}
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def compile_error(kind: Any, text: str) -> str:  # Any: one of the kinds of `Grammar`
    """Returns why a grammar cannot be compiled, or an empty string."""
    from llguidance import LLMatcher

    from worker.serve.grammars.sources import LIMITS, source_of

    try:
        is_error, messages = LLMatcher.validate_grammar_with_warnings(
            source_of(Grammar(kind=kind, text=text)), limits=LIMITS
        )
    except RecursionError:
        is_error, messages = True, ["it is nested too deeply"]
    except ValueError as bad:
        is_error, messages = True, [str(bad)]
    return messages[0].strip().split("\n")[0][:300] if is_error else ""


def validation_error(schema: str, text: str) -> tuple[str, bool]:
    """Returns why a text does not match a JSON Schema, or an empty string.

    The second value is true if the text is not even valid JSON.
    """
    import jsonschema_rs

    try:
        value = json.loads(text)
    except RecursionError:
        return "it is nested too deeply", False
    except ValueError as bad:
        return f"it is not valid JSON: {bad}"[:300], True
    try:
        _validator(schema).validate(value)
    except RecursionError:
        return "its schema is nested too deeply", False
    except (ValueError, jsonschema_rs.ValidationError) as bad:
        return str(bad).split("\n")[0][:300], False
    return "", False


@lru_cache(MAX_VALIDATORS)
def _validator(schema: str) -> Any:  # Any: a class of jsonschema_rs, which is imported late
    import jsonschema_rs

    return jsonschema_rs.Draft202012Validator(
        json.loads(schema),
        validate_formats=True,
        pattern_options=jsonschema_rs.RegexOptions(),
    )


# Two children, so that the compilation of one client does not delay the answers of others.
GRAMMAR_CHECKER = CheckProcess()
ANSWER_CHECKER = CheckProcess()
atexit.register(GRAMMAR_CHECKER.close)
atexit.register(ANSWER_CHECKER.close)

if __name__ == "__main__":
    serve()
