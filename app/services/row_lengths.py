"""Counts the tokens of a file's longest rows, and reads chat templates, in a child process.

The child process runs this module.

Loading a tokenizer and tokenising a long row hold the GIL for seconds, in any thread. In the API
process this would block the event loop and all streams.
"""

import heapq
import json
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import structlog
from pydantic import TypeAdapter
from tokenizers import Tokenizer

from app.contracts.messages import ChatCost, Contract, ModelKind
from app.errors import BadRequest, StillhouseError, TooManyRequests
from app.local.process_manager import environment_without_secrets
from app.parent_death import tethered
from app.services.fine_tuning.chat_rows import Row, texts_of_message, texts_of_tools
from app.services.training_rows import parse_row
from app.storage import store

log = structlog.get_logger(__name__)

# Limits of the rows that are tokenised per file, the longest first. Others are not kept in memory.
MAX_ROWS_COUNTED: Final = 256
MAX_BYTES_COUNTED: Final = 16 * 2**20
NO_TEMPLATE: Final = ChatCost(first=0, end=1, user=0, assistant=0, system=0)
CHECK_SECONDS: Final = 60.0
# Each check occupies a CPU core, and a thread of the pool that all requests of the process share.
MAX_CHECKS: Final = 4
MAX_PROJECT_CHECKS: Final = 2


@dataclass(frozen=True)
class Reader:
    """Properties of a model that decide how many tokens a row has.

    `key` is the model's folder in the store, and `cost` the tokens that its chat template adds.
    """

    key: str
    family: ModelKind
    cost: ChatCost = NO_TEMPLATE


class LengthCheck(Contract):
    """Request to find a row of a stored file that exceeds `max_tokens` for one of the readers.

    `is_answered` is True if the answers in the rows are used.
    """

    store_key: str
    over_bytes: int  # rows with at most this many bytes are known to fit
    max_tokens: int
    is_answered: bool
    readers: tuple[Reader, ...]


class VocabularyCheck(Contract):
    """Request for the vocabulary size that a stored model needs: its highest token id plus 1."""

    model_key: str


class TemplateCheck(Contract):
    """Request to find out which parts of rows with tools a model's chat template renders."""

    template_of: str  # the model's folder in the store


Check = LengthCheck | VocabularyCheck | TemplateCheck


class CheckResult(Contract):
    """The result of a check.

    For a length check, `line` and `num_tokens` describe a row that is too long, and are None if all
    rows fit. If only `num_tokens` is None, a tokenizer cannot split the row.
    For a vocabulary check, `num_tokens` is the number of token ids.
    For a template check, `has_tools` and `has_tool_calls` say what the template renders.
    `fault` says why a model cannot be used, and what to do.
    """

    line: int | None = None
    num_tokens: int | None = None
    is_lost: bool = False  # the file is no longer in the store
    has_tools: bool = False
    has_tool_calls: bool = False
    fault: str = ""


class UnreadableTokenizer(Exception):
    """The tokenizer of a stored model is missing or damaged. The message says what to do."""


class RunningChecks:
    """Limits how many checks run at the same time, in total and per project. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_of: Counter[str] = Counter()  # by project

    @contextmanager
    def one_more(self, project_id: str) -> Iterator[None]:
        """Counts a check of the project while the block runs. Raises TooManyRequests at a limit."""
        with self._lock:
            if self._num_of[project_id] >= MAX_PROJECT_CHECKS:
                raise TooManyRequests(
                    f"this project has {MAX_PROJECT_CHECKS} file checks in progress, the most that are allowed; "
                    "try again when one has finished"
                )
            if self._num_of.total() >= MAX_CHECKS:
                raise TooManyRequests(
                    "the files of other jobs are being checked; try again in a moment"
                )
            self._num_of[project_id] += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_of[project_id] -= 1
                if not self._num_of[project_id]:
                    del self._num_of[project_id]


SUBMISSIONS: Final = RunningChecks()
ESTIMATES: Final = RunningChecks()  # estimates never keep a job from being submitted
QUESTION: Final[TypeAdapter[Check]] = TypeAdapter(Check)


def ask(
    question: Check,
    project_id: str,
    *,
    param: str | None = None,
    running: RunningChecks = SUBMISSIONS,
) -> CheckResult:
    """Runs a check in a child process and returns its result.

    `param` becomes the parameter of errors, and `running` limits how many checks run.

    Raises:
        BadRequest: The check took too long, or a tokenizer cannot be read.
        TooManyRequests: Too many checks are running, for this project or in total.
        StillhouseError: The child process failed.
    """
    try:
        reply = run_check("app.services.row_lengths", question, project_id, running)
    except subprocess.TimeoutExpired as fault:
        raise _timed_out(question, param) from fault
    result = CheckResult.model_validate_json(reply)
    if result.fault:
        raise BadRequest(result.fault, "invalid_model", "model")
    return result


def run_check(module: str, question: Contract, project_id: str, running: RunningChecks) -> bytes:
    """Runs a module in a child process with a question on its standard input; returns its output.

    Raises:
        TimeoutExpired: The check took too long.
        TooManyRequests: Too many checks are running, for this project or in total.
        StillhouseError: The child process failed.
    """
    with running.one_more(project_id):
        try:
            process = subprocess.run(
                tethered([sys.executable, "-m", module]),
                input=question.model_dump_json().encode(),
                capture_output=True,
                timeout=CHECK_SECONDS,
                check=True,
                env=environment_without_secrets(),
            )
        except subprocess.CalledProcessError as fault:
            stderr = fault.stderr[-2000:].decode(errors="replace")
            log.error("row_check_failed", status=fault.returncode, stderr=stderr)
            raise StillhouseError("the rows of the file could not be checked; try again") from fault
        except subprocess.TimeoutExpired:
            log.warning(
                "row_check_timed_out", seconds=CHECK_SECONDS, question=question.model_dump()
            )
            raise
    return process.stdout


def _timed_out(question: Check, param: str | None) -> BadRequest:
    if isinstance(question, VocabularyCheck):
        message = "loading the teacher's tokenizer took more than {:.0f} s; leave vocab_size out or use another teacher"
        return BadRequest(message.format(CHECK_SECONDS), param=param)
    if isinstance(question, TemplateCheck):
        message = "reading a model's chat template took more than {:.0f} s; try again later"
        return BadRequest(message.format(CHECK_SECONDS), param=param)
    message = "counting the tokens of the file's longest rows took more than {:.0f} s; shorten or split these rows"
    return BadRequest(message.format(CHECK_SECONDS), "invalid_file", param)


def main() -> None:
    """Runs the check given on standard input as JSON, and writes its result to standard output."""
    question = QUESTION.validate_json(sys.stdin.buffer.read())
    try:
        result = answer(question)
    except UnreadableTokenizer as fault:
        result = CheckResult(fault=str(fault))
    sys.stdout.write(result.model_dump_json())


def answer(question: Check) -> CheckResult:
    """Returns the result of a check. Raises UnreadableTokenizer."""
    if isinstance(question, VocabularyCheck):
        vocabulary = load_tokenizer(question.model_key).get_vocab()
        # ids may have gaps
        return CheckResult(num_tokens=1 + max(vocabulary.values(), default=-1))
    if isinstance(question, TemplateCheck):
        text = template_text(question.template_of)
        return CheckResult(
            has_tools=re.search(r"\btools\b", text) is not None,
            has_tool_calls="tool_calls" in text,
        )
    return find_too_long(question)


def find_too_long(check: LengthCheck) -> CheckResult:
    """Returns the first of the longest rows that is too long, or that a tokenizer cannot split.

    Raises UnreadableTokenizer.
    """
    try:
        longest = longest_rows(check.store_key, over_bytes=check.over_bytes)
    except FileNotFoundError:
        return CheckResult(is_lost=True)
    for _, line_number, line in longest:
        row = parse_row(line)
        tokenizers = [load_tokenizer(reader.key) for reader in check.readers]
        try:
            num_tokens = max(
                count_tokens(row, tokenizer, reader, is_answered=check.is_answered)
                for tokenizer, reader in zip(tokenizers, check.readers, strict=True)
            )
        except BaseException as error:
            # The Rust library raises PanicException, which is no subclass of Exception.
            if type(error).__name__ != "PanicException":
                raise
            return CheckResult(line=line_number)
        if num_tokens > check.max_tokens:
            return CheckResult(line=line_number, num_tokens=num_tokens)
    return CheckResult()


def count_tokens(row: Row, tokenizer: Tokenizer, reader: Reader, *, is_answered: bool) -> int:
    """Returns the number of tokens of the sequence that a job builds from a row.

    An answer that the teacher will write counts as one token. For an encoder-decoder, returns the
    length of the longer of its two sequences.
    """
    cost = reader.cost
    if "messages" in row:
        num_tools = count_texts(tokenizer, texts_of_tools(row))
        return num_tools + count_chat(row["messages"], tokenizer, cost, is_answered=is_answered)
    has_template = cost != NO_TEMPLATE
    asked, *answer = [
        str(row[key]) for key in ("prompt", "input", "text", "completion", "target") if key in row
    ]
    num_asked = len(
        tokenizer.encode(asked, add_special_tokens="text" in row or not has_template).ids
    )
    num_answer = 1
    if "text" in row:
        if reader.family == "seq2seq":  # the second half is the target
            num_asked, num_answer = num_asked // 2, num_asked - num_asked // 2 + 1
    else:
        num_asked += cost.first
        if is_answered:
            num_answer = cost.end + len(tokenizer.encode(answer[0], add_special_tokens=False).ids)
    return max(num_asked, 1 + num_answer) if reader.family == "seq2seq" else num_asked + num_answer


def count_chat(
    messages: list[Row], tokenizer: Tokenizer, cost: ChatCost, *, is_answered: bool
) -> int:
    """Returns the number of tokens of a conversation, including those of the chat template.

    The text that a template adds around tools and tool calls is not counted.
    """
    if not is_answered and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    roles = [message["role"] for message in messages]
    num_assistant = roles.count("assistant")
    num_further = len(roles) - roles.count("system") - num_assistant - 1
    added = cost.first + cost.user * num_further + cost.assistant * (num_assistant - is_answered)
    added += (cost.system if "system" in roles else 0) + (cost.end if is_answered else 1)
    return added + sum(count_texts(tokenizer, texts_of_message(message)) for message in messages)


def count_texts(tokenizer: Tokenizer, texts: Iterable[str]) -> int:
    """Returns the number of tokens of texts, without special tokens."""
    return sum(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)


def longest_rows(store_key: str, *, over_bytes: int) -> list[tuple[int, int, bytes]]:
    """Returns (bytes, line number, line) of the lines with more than `over_bytes`, longest first.

    Returns at most MAX_ROWS_COUNTED lines and MAX_BYTES_COUNTED bytes.
    """
    rows: list[tuple[int, int, bytes]] = []
    num_bytes = 0
    with store().open(store_key) as file:
        for size, number, offset in heapq.nlargest(MAX_ROWS_COUNTED, _sizes(file, over_bytes)):
            num_bytes += size
            if num_bytes > MAX_BYTES_COUNTED:
                break
            file.seek(offset)
            rows.append((size, number, file.read(size)))
    return rows


def _sizes(file: Iterable[bytes], over_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Yields (bytes, line number, offset) of the lines with more than `over_bytes`."""
    offset = 0
    for number, line in enumerate(file, 1):
        if len(line) > over_bytes:
            yield len(line), number, offset
        offset += len(line)


def template_text(model_key: str) -> str:
    """Returns the text of all chat templates of a stored model."""
    folder = store()
    if folder.exists(f"{model_key}/chat_template.jinja"):
        with folder.open(f"{model_key}/chat_template.jinja") as file:
            return str(file.read().decode(errors="replace"))
    with folder.open(f"{model_key}/tokenizer_config.json") as file:
        return json.dumps(json.load(file).get("chat_template"))


@lru_cache(maxsize=8)
def load_tokenizer(model_key: str) -> Tokenizer:
    """Returns the tokenizer of a stored model. Cached, because it is needed for every row.

    Raises UnreadableTokenizer.
    """
    advice = "import or upload the model again, with the tokenizer.json of a fast tokenizer"
    try:
        with store().open(f"{model_key}/tokenizer.json") as file:
            content = file.read()
    except FileNotFoundError:
        raise UnreadableTokenizer(f"a model of the job has no tokenizer.json; {advice}") from None
    try:
        return Tokenizer.from_buffer(content)
    except BaseException as error:
        # The Rust library raises plain Exception, or PanicException, which is no subclass of it.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error)[:200]
        message = f"the tokenizer.json of a model of the job cannot be read ({reason}); {advice}"
        raise UnreadableTokenizer(message) from None


if __name__ == "__main__":
    main()
