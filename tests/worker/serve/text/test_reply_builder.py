"""Replies of answers with tool calls, built token by token as both engines do."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from tokenizers import AddedToken

from app.contracts.generation import Delta, GenerateRequest, Message, Reply, Tool, ToolUse
from tests.tiny import tiny_tokenizer
from worker.serve.decoding.sampling import SampledToken
from worker.serve.text.detokenizer import TokenText
from worker.serve.text.reply_builder import FinishReason, begin_answer

Make = Callable[..., GenerateRequest]
HELLO = (Message(role="user", content="Who?"),)
TOOLS = ToolUse(tools=(Tool(name="find"),))
CALL = '{"name": "find", "parameters": {"who": "naïve ∑"}}'


def tokenizer_with(template: str, *special: str) -> Any:  # Any: transformers is untyped here
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.add_tokens([AddedToken(text, special=True) for text in special], special_tokens=True)
    return tokenizer


def answer(
    request: GenerateRequest, tokenizer: Any, text: str, reason: FinishReason = "stop"
) -> Sequence[Reply]:
    """The replies while a model writes this text, up to the end of its choice."""
    built = begin_answer(request, (5, 6), TokenText(tokenizer), is_continued=True)
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    tokens += [tokenizer.eos_token_id] if reason == "stop" else []
    replies: list[Reply] = []
    for number, token in enumerate(tokens, 1):
        is_last = number == len(tokens)
        taken = built.take(0, SampledToken(token, -0.5), reason if is_last else None)
        replies += taken.replies
        if taken.is_choice_over:
            break
    return replies


def summary(replies: Sequence[Reply]) -> tuple[str, list[tuple[str | None, str]], str | None]:
    """Text, calls and finish reason."""
    deltas = [reply for reply in replies if isinstance(reply, Delta)]
    calls = [(call.name, call.arguments) for delta in deltas for call in delta.tool_calls]
    return "".join(delta.text for delta in deltas), calls, deltas[-1].finish_reason


@pytest.mark.parametrize(
    ("mark", "text"),
    [
        ("<tool_call>", f"Wait. <tool_call>{CALL}"),
        ("[TOOL_CALLS]", f"Wait. [TOOL_CALLS][{CALL}]"),
        ("<|tool_call|>", f"Wait. <|tool_call|>[{CALL}]"),
    ],
)
@pytest.mark.parametrize("is_special", [True, False])
def test_marks_are_found_whether_or_not_they_are_special_tokens(
    make_request: Make, mark: str, text: str, is_special: bool
) -> None:
    tokenizer = tokenizer_with(f"{{{{ tools }}}}{mark}", *([mark] if is_special else []))
    replies = answer(make_request(messages=HELLO, tool_use=TOOLS), tokenizer, text)
    calls = [("find", '{"who": "naïve ∑"}')]
    assert summary(replies) == ("Wait. ", calls, "tool_calls")


def test_a_special_mark_at_the_start_is_found(make_request: Make) -> None:
    tokenizer = tokenizer_with("{{ tools }}<|python_tag|>", "<|python_tag|>")
    request = make_request(messages=HELLO, tool_use=TOOLS)
    replies = answer(request, tokenizer, f"<|python_tag|>{CALL}")
    assert summary(replies) == ("", [("find", '{"who": "naïve ∑"}')], "tool_calls")


def test_without_tools_marks_stay_hidden_and_calls_stay_text(make_request: Make) -> None:
    tokenizer = tokenizer_with("{{ tools }}<|python_tag|>", "<|python_tag|>")
    for tool_use in (None, TOOLS.model_copy(update={"choice": "none"})):
        request = make_request(messages=HELLO, tool_use=tool_use)
        assert summary(answer(request, tokenizer, f"<|python_tag|>{CALL}")) == (CALL, [], "stop")


def test_a_cut_answer_keeps_its_reason_and_its_complete_calls(make_request: Make) -> None:
    tokenizer = tokenizer_with("{{ tools }}<tool_call>")
    text = f"<tool_call>{CALL}</tool_call><tool_call>{CALL[:20]}"
    replies = answer(make_request(messages=HELLO, tool_use=TOOLS), tokenizer, text, "length")
    assert summary(replies) == (
        f"<tool_call>{CALL[:20]}",
        [("find", '{"who": "naïve ∑"}')],
        "length",
    )


def test_without_parallel_calls_the_choice_ends_with_its_first_call(make_request: Make) -> None:
    tokenizer = tokenizer_with("{{ tools }}<tool_call>")
    tool_use = TOOLS.model_copy(update={"is_parallel": False})
    text = f"<tool_call>{CALL}</tool_call>" + " more text" * 20
    replies = answer(make_request(messages=HELLO, tool_use=tool_use), tokenizer, text)
    content, calls, reason = summary(replies)
    assert (content, len(calls), reason) == ("", 1, "tool_calls")
    num_tokens = replies[-1].completion_tokens  # type: ignore[union-attr]  # the last one is Done
    assert num_tokens <= len(tokenizer(f"<tool_call>{CALL}</tool").input_ids)


def test_the_log_probabilities_of_a_call_are_reported(make_request: Make) -> None:
    tokenizer = tokenizer_with("{{ tools }}<tool_call>")
    request = make_request(messages=HELLO, tool_use=TOOLS, logprobs=0)
    text = f"Hm <tool_call>{CALL}"
    replies = answer(request, tokenizer, text)
    deltas = [reply for reply in replies if isinstance(reply, Delta)]
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    assert [token for delta in deltas for token in delta.tokens] == tokens
    entries = [entry for delta in deltas for entry in delta.logprobs or ()]
    assert [entry.logprob for entry in entries] == [-0.5] * len(tokens)
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == text


def test_arguments_are_json_text(make_request: Make) -> None:
    tokenizer = tokenizer_with("{{ tools }}")  # no marks: plain JSON
    text, calls, _ = summary(answer(make_request(messages=HELLO, tool_use=TOOLS), tokenizer, CALL))
    assert text == ""
    assert json.loads(calls[0][1]) == {"who": "naïve ∑"}
