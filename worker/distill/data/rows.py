"""Training rows: read from JSONL, tokenised once, and split into training and held-out ones.

A row becomes an `Example`: its tokens and the spans of them that are targets. A target at position p is predicted from
the hidden state at p - 1, so no span begins at 0. Segments are tokenised apart (the prompt as serving will see it, then
the completion), and a completion ends with the end token, so that students learn to stop. What a decoder without an
encoder reads as one sequence, an encoder-decoder reads as a source and an answer that follows its start token.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from worker.errors import InvalidTrainingFile
from worker.models.architectures import ModelKind
from worker.models.template_limits import bounded

MAX_VALIDATION_ROWS = 200
# the template comes with the model: what it may raise, the limits on its time and memory included
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
    """One line of the file: exactly one of messages and text. An answered row ends with an assistant's turn."""

    line: int
    messages: tuple[dict[str, str], ...] = ()
    text: str | None = None
    unlearned: frozenset[int] = frozenset()  # answers of weight 0, by their place in messages

    @property
    def is_answered(self) -> bool:
        return self.text is not None or self.messages[-1]["role"] == "assistant"

    @property
    def question(self) -> "Row":
        """The row without its last answer."""
        return replace(self, messages=self.messages[:-1]) if self.is_answered else self


@dataclass(frozen=True)
class Example:
    """Tokens and the half-open spans of them that the loss looks at; without spans it waits for an answer.

    source_ids is what an encoder reads; then token_ids are the decoder's, its start token first.
    """

    token_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...] = ()
    line: int = 0
    source_ids: tuple[int, ...] = ()

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """What a model is given to answer: the source, or what comes before the last answer."""
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
    """The rows of a JSONL file; blank lines are skipped. Raises InvalidTrainingFile with the line."""
    rows = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                rows.append(_row(number, json.loads(line)))
            except (ValueError, KeyError, TypeError) as e:
                raise InvalidTrainingFile(f"line {number} is not a training row: {e!r}") from e
    if not rows:
        raise InvalidTrainingFile(f"{path.name} has no rows")
    return rows


def _row(number: int, fields: dict[str, Any]) -> Row:  # Any: open-ended JSON
    if "messages" in fields:
        turns = tuple(
            {"role": _text(m["role"]), "content": _text(m["content"])} for m in fields["messages"]
        )
        if all(turn["role"] in ("system", "developer", "assistant") for turn in turns):
            raise ValueError("messages has no user's turn")
        unlearned = frozenset(i for i, m in enumerate(fields["messages"]) if m.get("weight") == 0)
        return Row(number, turns, unlearned=unlearned)
    for asked, answer in (("prompt", "completion"), ("input", "target")):
        if asked in fields:
            user = {"role": "user", "content": _text(fields[asked])}
            if fields.get(answer) is None:
                return Row(number, (user,))
            return Row(number, (user, {"role": "assistant", "content": _text(fields[answer])}))
    return Row(number, text=_text(fields["text"]))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"text expected, not {type(value).__name__}")
    return value


class Encoder:
    """Turns rows into examples by a model's own tokenizer and chat template.

    With a chat template a plain prompt becomes a user's turn, as serving does it; without one it stays plain text.
    `start_id` is an encoder-decoder's decoder start token. With `is_last_only` (an encoder-decoder always) only the last
    answer is learned from, and plain text is cut in half: the second half answers the first.
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
        """Raises InvalidTrainingFile for rows that are too long, empty, or not to be rendered."""
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
        longest = max(len(token_ids) + (not row.is_answered), len(source_ids))  # room for an answer
        if longest > self.max_tokens:
            raise InvalidTrainingFile(
                f"line {row.line} has {longest} tokens, too many for the {self.max_tokens} of a sequence; shorten it "
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
                f"line {row.line} does not fit the model's chat template: {reason}"
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
        messages = list(row.messages)
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i > 0]
        if not row.is_answered:
            answers.append(len(messages))
        if self.is_last_only:
            answers = answers[-1:]
        segments: list[tuple[list[int], bool]] = []
        done = ""
        for i in answers:
            prefix = self._render(messages[:i], is_question=True)
            if not prefix.startswith(done):
                # the template rewrites earlier turns once later ones exist: learn from the last answer alone
                prefix = self._render(messages[: answers[-1]], is_question=True)
                last = self._answer(messages, answers[-1], prefix)[0] if row.is_answered else []
                return [(self._ids(prefix), False), *last]
            segments.append((self._ids(prefix[len(done) :]), False))
            if i < len(messages):
                pieces, done = self._answer(messages, i, prefix)
                is_learned = (
                    row.is_answered and i not in row.unlearned
                )  # else the answer to come alone is
                segments += [(ids, is_target and is_learned) for ids, is_target in pieces]
        return segments

    def _answer(
        self, messages: list[dict[str, str]], i: int, prefix: str
    ) -> tuple[list[tuple[list[int], bool]], str]:
        whole = self._render(messages[: i + 1], is_question=False)
        if not whole.startswith(prefix):
            whole = prefix + messages[i]["content"]
        ids = self._ids(whole[len(prefix) :])
        if self.end_id in ids:  # what follows the end token (a line break, say) is never generated
            end = ids.index(self.end_id) + 1
            return [(ids[:end], True), (ids[end:], False)], whole
        return [(ids + self._end(), True)], whole

    def _render(self, messages: list[dict[str, str]], *, is_question: bool) -> str:
        with bounded():
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=is_question
            )
        return str(text)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []

    def _prompt(self, text: str) -> list[int]:
        """As serving reads it: encoders, and models whose end token separates, keep what the tokenizer puts behind."""
        separates = self.end_id is not None and self.end_id == self.tokenizer.sep_token_id
        if self.shape == "seq2seq" or separates:
            return list(self.tokenizer.encode(text))
        return self._plain(text)

    def _plain(self, text: str) -> list[int]:
        """With the special tokens that the tokenizer puts before plain text, but not those behind it."""
        ids = list(self.tokenizer.encode(text))
        while ids and ids[-1] == self.end_id:
            ids.pop()
        if not ids and self.tokenizer.bos_token_id is not None:
            return [self.tokenizer.bos_token_id]
        return ids

    def _end(self) -> list[int]:
        return [] if self.end_id is None else [self.end_id]


def end_id_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends an answer: BERT's tokenizers have a separator only."""
    found: int | None = (
        tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    )
    return found


def _split_source(
    segments: list[tuple[list[int], bool]], start_id: int
) -> tuple[list[int], list[tuple[list[int], bool]]]:
    """What an encoder reads, and what its decoder does: what follows the answer is left out."""
    source = [token for ids, is_target in segments if not is_target for token in ids]
    answers = [segment for segment in segments if segment[1]]
    if answers:  # a template's line break behind the answer is not of the source
        first = segments.index(answers[0])
        source = [token for ids, _ in segments[:first] for token in ids]
    return source, [([start_id], False), *answers]


def split_rows(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows: a tenth of them, at most 200, chosen by what they ask.

    Rows that ask the same fall on the same side, so nothing held out is also trained on. The choice depends on the rows
    alone, neither on their order nor on a seed. A single question cannot be split: then it is on both sides.
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
    """The rows that ask nothing the others ask."""
    asked = {question_key(row) for row in others}
    return [row for row in rows if question_key(row) not in asked]


def question_key(row: Row) -> str:
    """Hash of what a row asks (of the whole row when it asks nothing)."""
    asked = row.text if row.text is not None else json.dumps(row.question.messages, sort_keys=True)
    return hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()
