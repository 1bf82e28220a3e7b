"""Counts the rows, tokens and steps of a job, in a child process that runs this module.

Loading a tokenizer and counting tokens would block the API process (app.services.row_lengths).
Of a large file, evenly spread rows are counted, and the counts are scaled.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Tokenizer

from app.contracts.batch_plan import BatchPlan, batch_tokens_of, eval_steps_of
from app.contracts.distillation import Hyperparameters
from app.contracts.messages import Contract
from app.contracts.planned_jobs import RowCounts
from app.contracts.run_limits import (
    MAX_LABEL_TOKENS,
    MAX_LABELS,
    MAX_PLANNED_EPOCHS,
    MAX_VALIDATION_ROWS,
    ROWS_PER_LABEL,
)
from app.services.fine_tuning.chat_rows import (
    Row,
    texts_of_content,
    texts_of_message,
    texts_of_tools,
)
from app.services.row_lengths import (
    NO_TEMPLATE,
    Reader,
    UnreadableTokenizer,
    count_texts,
    count_tokens,
    load_tokenizer,
)
from app.services.training_rows import parse_row
from app.storage import store

MAX_SAMPLED_BYTES = 4 * 2**20


class CountedFile(Contract):
    """A file to count. `is_answered` is true if the answers in its rows are used."""

    store_key: str
    num_bytes: int
    is_answered: bool


class CountRequest(Contract):
    """Request to count the rows of a job.

    readers: The student, and the teacher if it reads the rows differently.
    answer_tokens: Assumed length of the answers that the teacher will write.
    device: Where the job will be trained. Automatic batches depend on it.
    """

    training: CountedFile
    validation: CountedFile | None = None
    test: CountedFile | None = None
    readers: tuple[Reader, ...]
    answer_tokens: float
    hyperparameters: Hyperparameters
    seed: int
    device: Literal["cpu", "cuda"] = "cpu"


class CountReply(Contract):
    """Counts of a job's rows. `sampled_share` is the share of the training file that was counted.

    If `counts` is None, `fault` says why the rows cannot be counted, and `code` is that of the error.
    """

    counts: RowCounts | None
    sampled_share: float = 1.0
    fault: str = ""
    code: str = "invalid_file"


class NoTokens(Exception):
    """No row of a file can be tokenised."""


@dataclass(frozen=True)
class RowSize:
    """Tokens of a row: for the student, its targets, for the teacher, and of its prompt.

    `question` is a hash by which rows are held out, and `answer` the text of the answer.
    """

    num_tokens: int
    num_targets: int
    teacher_tokens: int
    prompt_tokens: int
    question: str
    answer: str


def main() -> None:
    """Counts the rows of the request on standard input, and writes the reply to standard output."""
    request = CountRequest.model_validate_json(sys.stdin.buffer.read())
    sys.stdout.write(count(request).model_dump_json())


def count(request: CountRequest) -> CountReply:
    """Returns the counts of a job's rows and steps."""
    try:
        training, scale = _sizes(request, request.training)
        validation = _sizes(request, request.validation) if request.validation else None
        tests, test_scale = _sizes(request, request.test) if request.test else ([], 1.0)
    except FileNotFoundError:
        fault = "the content of a file is no longer in the store; upload it again"
        return CountReply(counts=None, fault=fault)
    except NoTokens as fault:
        return CountReply(counts=None, fault=str(fault))
    except UnreadableTokenizer as fault:
        return CountReply(counts=None, fault=str(fault), code="invalid_model")
    if validation is None:
        held_out = hold_out([size.question for size in training], scale)
        is_split = len(held_out) < len(training)  # with one question, both sides have all rows
        train = [size for i, size in enumerate(training) if not is_split or i not in held_out]
        valid, valid_scale = [training[i] for i in sorted(held_out)], scale
    else:
        train, (valid, valid_scale) = training, validation
    return CountReply(
        counts=RowCounts(
            **_row_counts(request, train, scale, valid, valid_scale),
            **_steps(request, train, scale, valid),
            num_test=round(len(tests) * test_scale),
            test_tokens=_scaled(tests, test_scale),
            label_tokens=_label_tokens(tests or valid, request),
        ),
        sampled_share=1 / scale,
    )


def _row_counts(
    request: CountRequest,
    train: Sequence[RowSize],
    scale: float,
    valid: Sequence[RowSize],
    valid_scale: float,
) -> dict[str, Any]:  # Any: whole numbers and means
    """Returns the fields of `RowCounts` that sum over rows."""
    both = [(train, scale), (valid, valid_scale)]
    sizes = [*train, *valid]
    num_rows = [round(len(rows) * factor) for rows, factor in both]
    return {
        "num_train": num_rows[0],
        "num_valid": num_rows[1],
        "train_tokens": _scaled(train, scale),
        "train_targets": round(scale * sum(size.num_targets for size in train)),
        "valid_tokens": _scaled(valid, valid_scale),
        "valid_targets": round(valid_scale * sum(size.num_targets for size in valid)),
        "teacher_tokens": round(
            sum(factor * (size.teacher_tokens - 1) for rows, factor in both for size in rows)
        ),
        "num_unanswered": sum(
            0 if file.is_answered else number
            for file, number in zip(
                (request.training, request.validation or request.training), num_rows, strict=True
            )
        ),
        "prompt_tokens": sum(size.prompt_tokens for size in sizes) / len(sizes),
        "answer_tokens": sum(size.num_targets for size in sizes) / len(sizes),
        "longest_tokens": max(max(size.num_tokens, size.teacher_tokens) for size in sizes),
    }


def _scaled(sizes: Sequence[RowSize], scale: float) -> int:
    """Returns the tokens that the student reads. The last token of a row is only a target."""
    return round(scale * sum(size.num_tokens - 1 for size in sizes))


def _steps(
    request: CountRequest, train: Sequence[RowSize], scale: float, valid: Sequence[RowSize]
) -> dict[str, Any]:  # Any: whole numbers and a share
    """Returns the fields of `RowCounts` about steps, planned as the trainer plans them."""
    h = request.hyperparameters
    lengths = [size.num_tokens for size in train]
    num_tokens = round(scale * sum(lengths))
    plan = BatchPlan(
        lengths,
        batch_tokens=batch_tokens_of(
            h, device=request.device, num_tokens=num_tokens, num_processes=h.num_devices
        ),
        seed=request.seed,
        batch_rows=h.batch_rows,
    )
    num_planned = min(h.n_epochs, MAX_PLANNED_EPOCHS)
    full_steps = max(1, round(scale * plan.num_steps(num_planned) * h.n_epochs / num_planned))
    num_steps = min(full_steps, h.max_steps or full_steps)
    num_held_out = sum(size.num_tokens for size in valid)
    interval = eval_steps_of(h, plan, max(1, round(num_steps / scale)), num_held_out)
    interval = interval if h.eval_steps != "auto" else max(1, round(interval * scale))
    return {
        "num_steps": num_steps,
        "num_epochs": h.n_epochs * num_steps / full_steps,
        "num_evals": -(-num_steps // interval),
    }


def hold_out(questions: Sequence[str], scale: float) -> set[int]:
    """Returns the rows that a job holds out, given the hash of each row's question.

    The rule is that of worker/distill/data/split.py for rows that have one question each. If all
    rows have the same question, returns all.
    """
    num_rows = len(questions)
    wanted = max(1, min(round(num_rows * scale) // 10, MAX_VALIDATION_ROWS))
    wanted = min(max(1, round(wanted / scale)), num_rows - 1)
    groups: dict[str, list[int]] = {}
    for i, question in enumerate(questions):
        groups.setdefault(question, []).append(i)
    chosen: set[int] = set()
    for question in sorted(groups):
        if len(chosen) + len(groups[question]) <= wanted:
            chosen.update(groups[question])
    smallest: list[int] = min(groups.values(), key=len)
    return chosen or set(smallest)


def _sizes(request: CountRequest, file: CountedFile) -> tuple[list[RowSize], float]:
    """Returns the sizes of the sampled rows of a file, and how many rows each stands for."""
    stride = max(1, -(-file.num_bytes // MAX_SAMPLED_BYTES))
    num_rows, sizes = 0, []
    with store().open(file.store_key) as lines:
        for number, line in enumerate(lines):
            if line.strip():
                num_rows += 1
                if number % stride == 0 and (size := _size_of_line(request, line, file)):
                    sizes.append(size)
    if not sizes:
        raise NoTokens("no row can be tokenised by the tokenizer of a model; change the rows")
    return sizes, num_rows / len(sizes)


def _size_of_line(request: CountRequest, line: bytes, file: CountedFile) -> RowSize | None:
    """Returns the size of a row, or None if a tokenizer cannot split it."""
    try:
        return _size(request, parse_row(line), is_answered=file.is_answered)
    except BaseException as error:
        # The Rust library raises PanicException, which is no subclass of Exception.
        if type(error).__name__ != "PanicException":
            raise
        return None


def _size(request: CountRequest, row: Row, *, is_answered: bool) -> RowSize:
    student, teacher = request.readers[0], request.readers[-1]
    added = 0.0 if is_answered else request.answer_tokens
    tokenizer = load_tokenizer(student.key)
    num_prompt = prompt_tokens(row, tokenizer, student, is_answered=is_answered)
    whole = _whole(row, student, is_answered=is_answered)
    # One token stands for an answer that the teacher will write.
    num_tokens = whole + round(added) - (not is_answered)
    theirs = num_tokens
    if teacher is not student:
        theirs = _whole(row, teacher, is_answered=is_answered) + round(added) - (not is_answered)
    texts = answer_texts(row) if is_answered else []
    num_targets = max(1, num_tokens - num_prompt)
    return RowSize(num_tokens, num_targets, theirs, num_prompt, question_of(row), " ".join(texts))


def _whole(row: Row, reader: Reader, *, is_answered: bool) -> int:
    """Returns the tokens of a row: for an encoder-decoder, those of both sequences."""
    tokenizer = load_tokenizer(reader.key)
    if reader.family != "seq2seq":
        return count_tokens(row, tokenizer, reader, is_answered=is_answered)
    source = count_tokens(row, tokenizer, reader, is_answered=False)
    answer = count_texts(tokenizer, answer_texts(row)[-1:]) if is_answered else 1
    if "text" in row:
        answer = source + 1
    return source + 1 + answer + (reader.cost.end if is_answered and "text" not in row else 0)


def prompt_tokens(row: Row, tokenizer: Tokenizer, reader: Reader, *, is_answered: bool) -> int:
    """Returns the tokens of a row that are no targets, with those of the chat template."""
    if "text" in row:
        return 1 if reader.family != "seq2seq" else _whole(row, reader, is_answered=True) // 2
    whole = _whole(row, reader, is_answered=is_answered)
    if not is_answered:
        return whole - 1
    answers = answer_texts(row)
    ends = max(1, min(reader.cost.end, 1)) if reader.cost != NO_TEMPLATE else 1
    if reader.family == "seq2seq":
        answers = answers[-1:]
    return whole - count_texts(tokenizer, answers) - ends * len(answers)


def answer_texts(row: Row) -> list[str]:
    """Returns the answers of a row that are learned: the completion, or those of a conversation."""
    if "messages" in row:
        return [
            "".join(texts_of_message(message))
            for message in row["messages"]
            if message["role"] == "assistant" and message.get("weight") != 0
        ]
    return [str(row[key]) for key in ("completion", "target", "text") if row.get(key) is not None][
        :1
    ]


def question_of(row: Row) -> str:
    """Returns a hash of the row's last question, as worker/distill/data/split.py computes it.

    Tools and tool calls are left out, so rows with tools may be held out differently.
    """
    if "text" in row:
        return _sha256(str(row["text"]))
    if "messages" not in row:
        asked = str(row.get("prompt") if row.get("prompt") is not None else row.get("input"))
        return _sha256(json.dumps([{"role": "user", "content": asked}], sort_keys=True))
    messages = row["messages"]
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    turns = [
        {"role": m["role"], "content": "".join(texts_of_content(m.get("content"), ""))}
        for m in messages
    ]
    tools = texts_of_tools(row)
    return _sha256(json.dumps([turns, tools] if tools else turns, sort_keys=True))


def _label_tokens(sizes: Sequence[RowSize], request: CountRequest) -> int | None:
    """Returns the length of the longest answer if the answers are class labels, else None."""
    names = Counter(size.answer.strip().casefold() for size in sizes)
    longest = max(size.num_targets for size in sizes)
    is_few = 2 <= len(names) <= MAX_LABELS and len(sizes) >= ROWS_PER_LABEL * len(names)
    is_label = is_few and longest <= MAX_LABEL_TOKENS + 1
    return longest if is_label else None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


if __name__ == "__main__":
    main()
