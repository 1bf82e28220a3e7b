"""Training rows with tools, in the format of OpenAI."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from worker.distill.data.chat_rows import answer_text, tools_of, turns_of
from worker.distill.data.rows import Encoder, read_rows
from worker.distill.data.split import questions_of
from worker.errors import InvalidTrainingFile

WriteRows = Callable[..., Path]
Json = dict[str, Any]  # Any: rows of a file
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n# Tools{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FUNCTION = {"name": "find", "description": "Finds a jar.", "parameters": {"type": "object"}}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "find", "arguments": '{"jar": "red"}'},
}
ROW: Json = {
    "messages": [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "short."}]},
        {"role": "user", "content": "Where is it?", "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "the house"},
        {"role": "assistant", "content": "In the house."},
    ],
    "tools": [{"type": "function", "function": FUNCTION}],
    "parallel_tool_calls": False,
}  # fmt: skip
DEPRECATED: Json = {
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Where is it?"},
        {"role": "assistant", "function_call": CALL["function"]},
        {"role": "function", "name": "find", "content": "the house"},
        {"role": "assistant", "content": "In the house."},
    ],
    "functions": [FUNCTION],
}


@pytest.fixture
def encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    tokenizer.chat_template = TOOL_TEMPLATE
    return Encoder(tokenizer, max_tokens=4096)


def text_and_targets(encoder: Encoder, path: Path) -> tuple[str, list[str]]:
    (row,) = read_rows(path)
    example = encoder.encode(row)
    decode = encoder.tokenizer.decode
    return decode(example.token_ids), [decode(example.token_ids[a:b]) for a, b in example.spans]


def test_calls_and_answers_are_learned_and_tools_and_results_are_read(
    encoder: Encoder, write_rows: WriteRows
) -> None:
    text, targets = text_and_targets(encoder, write_rows([ROW]))
    call = '<tool_call>{"name": "find", "arguments": {"jar": "red"}}</tool_call><|im_end|>'
    assert targets == [call, "In the house.<|im_end|>"]
    assert text == (
        f'<|im_start|>system\n# Tools{{"type": "function", "function": {json.dumps(FUNCTION)}}}<|im_end|>\n'
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nWhere is it?<|im_end|>\n"
        f"<|im_start|>assistant\n{call}\n<|im_start|>tool\nthe house<|im_end|>\n"
        "<|im_start|>assistant\nIn the house.<|im_end|>\n"
    )


def test_functions_are_read_as_tools(encoder: Encoder, write_rows: WriteRows) -> None:
    both = [text_and_targets(encoder, write_rows([row])) for row in (ROW, DEPRECATED)]
    assert both[0] == both[1]


def test_a_call_of_weight_0_is_not_learned_from(encoder: Encoder, write_rows: WriteRows) -> None:
    messages = [{**m, "weight": 0} if "tool_calls" in m else m for m in ROW["messages"]]
    text, targets = text_and_targets(encoder, write_rows([{**ROW, "messages": messages}]))
    assert targets == ["In the house.<|im_end|>"]
    assert text == text_and_targets(encoder, write_rows([ROW]))[0]


def test_a_row_ends_with_its_last_weighted_answer(encoder: Encoder, write_rows: WriteRows) -> None:
    messages = [*ROW["messages"][:-1], {**ROW["messages"][-1], "weight": 0}]
    text, targets = text_and_targets(encoder, write_rows([{**ROW, "messages": messages}]))
    assert len(targets) == 1
    assert targets[0].startswith("<tool_call>")
    assert text.endswith(targets[0] + "\n")


def test_rows_with_other_tools_ask_other_questions(write_rows: WriteRows) -> None:
    one, other, bare = read_rows(
        write_rows([ROW, {**ROW, "tools": [{"function": {"name": "a"}}]}, {**ROW, "tools": None}])
    )
    assert not set(questions_of(one).values()) & set(questions_of(other).values())
    assert not set(questions_of(one).values()) & set(questions_of(bare).values())


def test_a_template_that_renders_a_call_elsewhere_is_refused(
    encoder: Encoder, write_rows: WriteRows
) -> None:
    encoder.tokenizer.chat_template = "{{ messages | length }}" + TOOL_TEMPLATE
    (row,) = read_rows(write_rows([{**ROW, "messages": ROW["messages"][:3]}]))
    with pytest.raises(InvalidTrainingFile, match="before a tool call differently"):
        encoder.encode(row)


def test_a_template_may_read_tools_from_the_system_message(
    encoder: Encoder, write_rows: WriteRows
) -> None:
    encoder.tokenizer.chat_template = TOOL_TEMPLATE.replace(
        "{{ m.content }}", "{{ m.content }}{% if m['tools'] %}[{{ m['tools'] }}]{% endif %}"
    ).replace("for m in", "for message in").replace("m.", "message.").replace("m['", "message['")  # fmt: skip
    text, _ = text_and_targets(encoder, write_rows([ROW]))
    assert f"Be short.[{json.dumps([FUNCTION])}]<|im_end|>" in text


def test_a_tool_message_has_the_name_of_its_call() -> None:
    assert turns_of(ROW["messages"])[3] == {
        "role": "tool",
        "content": "the house",
        "tool_call_id": "call_1",
        "name": "find",
    }


def test_a_tool_without_parameters_takes_an_empty_object() -> None:
    (tool,) = tools_of({"tools": [{"type": "function", "function": {"name": "a", "strict": True}}]})
    empty = {"type": "object", "properties": {}}
    assert tool == {"type": "function", "function": {"name": "a", "parameters": empty}}


def test_a_call_is_shown_as_json_in_samples() -> None:
    assert (
        answer_text(turns_of(ROW["messages"])[2]) == '{"name": "find", "arguments": {"jar": "red"}}'
    )
