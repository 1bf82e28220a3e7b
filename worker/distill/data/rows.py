"""Reads rows from JSONL files and encodes them as tokens with target spans.

A row is encoded as an `Example`: its tokens, and the spans of tokens that are targets. The target
at position p is predicted from the hidden state at p - 1, so no span begins at 0.

Prompt and completion are tokenised separately, so that the prompt has the same tokens as in
serving. A completion ends with the end token, so that students learn to stop. A decoder-only model
reads prompt and completion as one sequence. In an encoder-decoder the encoder reads the prompt, and
the decoder reads its start token and the completion.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from app.contracts.messages import ModelKind
from app.contracts.run_limits import MAX_VALIDATION_ROWS
from worker.distill.data.chat_rows import Json, render, text_of, tools_of, turns_of
from worker.errors import InvalidTrainingFile
from worker.models.template_limits import bounded

# Errors that a model's chat template may raise, including those of its time and memory limits.
TEMPLATE_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    TimeoutError,
    MemoryError,
)


@dataclass(frozen=True)
class Row:
    """One line of a file, with either `messages` or `text`.

    An answered row is a plain text, or ends with an assistant turn. Messages and tools have the
    form that chat templates expect, see worker.distill.data.chat_rows.
    """

    line: int
    messages: tuple[Json, ...] = ()
    text: str | None = None
    tools: tuple[Json, ...] = ()
    unlearned: frozenset[int] = frozenset()  # indices of the messages with weight 0

    @property
    def is_answered(self) -> bool:
        return self.text is not None or self.messages[-1]["role"] == "assistant"

    @property
    def question(self) -> "Row":
        """The row without its final answer."""
        return replace(self, messages=self.messages[:-1]) if self.is_answered else self


@dataclass(frozen=True)
class Example:
    """Tokens of a row, and the half-open spans of targets. Without spans it needs an answer first.

    For an encoder-decoder, `source_ids` is the input of the encoder, and `token_ids` are the
    decoder's tokens, beginning with the start token.
    """

    token_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...] = ()
    line: int = 0
    source_ids: tuple[int, ...] = ()

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """Prompt for generating an answer: the source, or the tokens before the last answer."""
        return self.source_ids or self._before_answer

    @property
    def _before_answer(self) -> tuple[int, ...]:
        return self.token_ids[: self.spans[-1][0]] if self.spans else self.token_ids

    @property
    def num_tokens(self) -> int:
        return len(self.source_ids) + len(self.token_ids)

    @property
    def completion_ids(self) -> tuple[int, ...]:
        return self.token_ids[slice(*self.spans[-1])] if self.spans else ()

    @property
    def target_positions(self) -> list[int]:
        return [p for start, end in self.spans for p in range(start, end)]

    @property
    def num_targets(self) -> int:
        return sum(end - start for start, end in self.spans)

    def answered(self, completion_ids: Sequence[int]) -> "Example":
        before = self._before_answer
        span = (len(before), len(before) + len(completion_ids))
        return Example((*before, *completion_ids), (span,), self.line, self.source_ids)


def read_rows(path: Path) -> list[Row]:
    """Returns the rows of a JSONL file. Blank lines are skipped.

    Raises InvalidTrainingFile, with the line number, if a line is not a row or if there are none.
    """
    rows = list(_rows(path))
    if not rows:
        raise InvalidTrainingFile(f"{path.name} has no rows")
    return rows


def first_row(path: Path) -> Row:
    """Returns the first row of a JSONL file. Raises InvalidTrainingFile."""
    for row in _rows(path):
        return row
    raise InvalidTrainingFile(f"{path.name} has no rows")


def _rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield _row(number, json.loads(line))
            except (ValueError, KeyError, TypeError) as e:
                raise InvalidTrainingFile(f"line {number} is not a training row: {e!r}") from e


def _row(number: int, fields: dict[str, Any]) -> Row:  # Any: open-ended JSON
    if "messages" in fields:
        return _chat_row(number, fields)
    for asked, answer in (("prompt", "completion"), ("input", "target")):
        if asked in fields:
            user = {"role": "user", "content": text_of(fields[asked])}
            if fields.get(answer) is None:
                return Row(number, (user,))
            return Row(number, (user, {"role": "assistant", "content": text_of(fields[answer])}))
    return Row(number, text=text_of(fields["text"]))


def _chat_row(number: int, fields: dict[str, Any]) -> Row:  # Any: open-ended JSON
    """Returns a row with messages. It ends with the last answer that is learned from, if any."""
    turns = turns_of(fields["messages"])
    if all(turn["role"] in ("system", "developer", "assistant") for turn in turns):
        raise ValueError("messages has no user message")
    unlearned = frozenset(i for i, m in enumerate(fields["messages"]) if m.get("weight") == 0)
    while turns[-1]["role"] == "assistant" and len(turns) - 1 in unlearned:
        before = [i for i, turn in enumerate(turns[:-1]) if turn["role"] == "assistant"]
        if not before:
            raise ValueError("all answers have weight 0")
        turns = turns[: before[-1] + 1]
    unlearned = frozenset(i for i in unlearned if i < len(turns))
    return Row(number, turns, unlearned=unlearned, tools=tools_of(fields))


class Encoder:
    """Encodes rows as examples with a model's tokenizer and chat template.

    With a chat template a prompt becomes a user turn, as in serving. Without one it stays plain
    text. `start_id` is the decoder start token of an encoder-decoder.

    With `is_last_only` only the last answer of a row has targets, and a plain text is cut in half:
    the second half is the answer to the first. An encoder-decoder always works that way.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int,
        shape: ModelKind = "causal",
        start_id: int | None = None,
        is_last_only: bool = False,
    ) -> None:
        assert (start_id is not None) == (shape == "seq2seq")
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.shape = shape
        self.start_id = start_id
        self.is_last_only = is_last_only or shape == "seq2seq"
        self.end_id = end_id_of(tokenizer)

    def encode(self, row: Row) -> Example:
        """Returns the row as tokens with target spans.

        Raises InvalidTrainingFile if the row is too long or empty, has no targets, or does not fit
        the chat template.
        """
        segments = self._segments(row)
        source_ids: list[int] = []
        if self.start_id is not None:
            source_ids, segments = _split_source(segments, self.start_id)
        token_ids: list[int] = []
        spans = []
        for ids, is_target in segments:
            if is_target and ids:
                # nothing predicts the very first token
                spans.append((max(len(token_ids), 1), len(token_ids) + len(ids)))
            token_ids += ids
        spans = [(start, end) for start, end in spans if end > start]
        # an unanswered row needs room for at least one token of an answer
        longest = max(len(token_ids) + (not row.is_answered), len(source_ids))
        if longest > self.max_tokens:
            raise InvalidTrainingFile(
                f"line {row.line} has {longest} tokens, but a sequence has at most {self.max_tokens}; shorten it "
                "or raise max_sequence_tokens (at most the model's context)"
            )
        if row.is_answered and not spans:
            raise InvalidTrainingFile(f"line {row.line} has no completion tokens to learn from")
        if not (source_ids or self.start_id is None) or not token_ids:
            raise InvalidTrainingFile(f"line {row.line} has an empty prompt")
        return Example(tuple(token_ids), tuple(spans), row.line, tuple(source_ids))

    def _segments(self, row: Row) -> list[tuple[list[int], bool]]:
        if row.text is not None:
            return self._text_segments(row.text)
        if self.tokenizer.chat_template is None:
            return self._plain_segments(row)
        try:
            return self._chat_segments(row)
        except TEMPLATE_ERRORS as e:
            reason = str(e)[:300] or type(e).__name__
            raise InvalidTrainingFile(
                f"line {row.line} cannot be rendered with the model's chat template: {reason}"
            ) from e

    def _text_segments(self, text: str) -> list[tuple[list[int], bool]]:
        ids = self._plain(text)
        half = len(ids) // 2 if self.is_last_only else 0
        return [(ids[:half], False), (ids[half:] + self._end(), True)]

    def _plain_segments(self, row: Row) -> list[tuple[list[int], bool]]:
        if [m["role"] for m in row.messages] not in (["user"], ["user", "assistant"]):
            raise InvalidTrainingFile(
                f"line {row.line} is a conversation, but the model has no chat template; use prompt and completion"
            )
        prompt = (self._prompt(row.messages[0]["content"]), False)
        if not row.is_answered:
            return [prompt]
        return [prompt, (self._ids(row.messages[1]["content"]) + self._end(), True)]

    def _chat_segments(self, row: Row) -> list[tuple[list[int], bool]]:
        messages, tools = list(row.messages), row.tools
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i > 0]
        if not row.is_answered:
            answers.append(len(messages))
        if self.is_last_only:
            answers = answers[-1:]
        segments: list[tuple[list[int], bool]] = []
        done = ""
        for i in answers:
            prefix = self._render(messages[:i], tools, is_question=True)
            if not prefix.startswith(done):
                # The template renders earlier turns differently when later ones follow. Then only
                # the last answer is a target.
                prefix = self._render(messages[: answers[-1]], tools, is_question=True)
                last = self._answer(row, answers[-1], prefix)[0] if row.is_answered else []
                return [(self._ids(prefix), False), *last]
            segments.append((self._ids(prefix[len(done) :]), False))
            if i < len(messages):
                pieces, done = self._answer(row, i, prefix)
                # in an unanswered row only the future answer will be a target
                is_learned = row.is_answered and i not in row.unlearned
                segments += [(ids, is_target and is_learned) for ids, is_target in pieces]
        return segments

    def _answer(self, row: Row, i: int, prefix: str) -> tuple[list[tuple[list[int], bool]], str]:
        turn = row.messages[i]
        text = self._render(row.messages[: i + 1], row.tools, is_question=False)
        if not text.startswith(prefix):
            if "tool_calls" in turn:
                raise ValueError(
                    "it renders the messages before a tool call differently once the call follows"
                )
            text = prefix + turn["content"]
        ids = self._ids(text[len(prefix) :])
        # text after the end token, such as a line break, is never generated
        if self.end_id in ids:
            end = ids.index(self.end_id) + 1
            return [(ids[:end], True), (ids[end:], False)], text
        return [(ids + self._end(), True)], text

    def _render(self, messages: Sequence[Json], tools: Sequence[Json], *, is_question: bool) -> str:
        with bounded():
            return render(self.tokenizer, messages, tools, is_question=is_question)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []

    def _prompt(self, text: str) -> list[int]:
        """Returns the tokens of a prompt as serving encodes it.

        The special tokens that the tokenizer appends are kept for encoder-decoders, and for models
        whose end token is the separator token.
        """
        separates = self.end_id is not None and self.end_id == self.tokenizer.sep_token_id
        if self.shape == "seq2seq" or separates:
            return list(self.tokenizer.encode(text))
        return self._plain(text)

    def _plain(self, text: str) -> list[int]:
        """Returns the tokens of a text with the special tokens that the tokenizer puts before it.

        End tokens that the tokenizer appends are removed.
        """
        ids = list(self.tokenizer.encode(text))
        while ids and ids[-1] == self.end_id:
            ids.pop()
        if not ids and self.tokenizer.bos_token_id is not None:
            return [self.tokenizer.bos_token_id]
        return ids

    def _end(self) -> list[int]:
        return [] if self.end_id is None else [self.end_id]


def end_id_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Returns the token that ends an answer.

    It is the separator token for tokenizers without an end token, such as BERT's.
    """
    found: int | None = (
        tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    )
    return found


def _split_source(
    segments: list[tuple[list[int], bool]], start_id: int
) -> tuple[list[int], list[tuple[list[int], bool]]]:
    """Returns the encoder's tokens and the decoder's segments.

    The decoder's segments are the start token and the answer. Text after the answer is left out.
    """
    source = [token for ids, is_target in segments if not is_target for token in ids]
    answers = [segment for segment in segments if segment[1]]
    if answers:  # text after the answer, such as a line break, does not belong to the source
        first = segments.index(answers[0])
        source = [token for ids, _ in segments[:first] for token in ids]
    return source, [([start_id], False), *answers]


def split_rows(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Returns training and held-out rows, split by a hash of the question (split version 1).

    About a tenth of the rows are held out, or about MAX_VALIDATION_ROWS if that is less. Rows with
    the same question are on the same side. The split depends only on the rows, not on their order
    or on a seed. If there is only one question, both sides have all rows.
    """
    by_question: dict[str, list[Row]] = {}
    for row in rows:
        by_question.setdefault(question_key(row), []).append(row)
    wanted = max(1, min(len(rows) // 10, MAX_VALIDATION_ROWS))
    held_out: set[str] = set()
    num_held_out = 0
    for key in sorted(by_question):
        if num_held_out >= wanted or len(held_out) == len(by_question) - 1:
            break
        held_out.add(key)
        num_held_out += len(by_question[key])
    if not held_out:
        return list(rows), list(rows)
    return (
        [row for row in rows if question_key(row) not in held_out],
        [row for row in rows if question_key(row) in held_out],
    )


def without_questions_of(rows: Sequence[Row], others: Sequence[Row]) -> list[Row]:
    """Returns the rows whose question none of `others` has."""
    asked = {question_key(row) for row in others}
    return [row for row in rows if question_key(row) not in asked]


def question_key(row: Row) -> str:
    """Returns a hash of the row's question, or of the whole text if the row is a plain text."""
    asked = row.text if row.text is not None else asked_text(row, len(row.question.messages))
    return hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()


def asked_text(row: Row, num_messages: int) -> str:
    """Returns the first messages of a row as text, with its tools if it has any."""
    messages = row.messages[:num_messages]
    return json.dumps([messages, row.tools] if row.tools else messages, sort_keys=True)
