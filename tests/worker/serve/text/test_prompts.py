"""From text, tokens and messages to prompt tokens, and what is refused."""

import json
from collections.abc import Callable

import pytest

from app.contracts.generation import GenerateRequest, Message, Tool, ToolCall, ToolUse
from tests.tiny import tiny_tokenizer
from worker.serve.decoding.families import Context
from worker.serve.errors import (
    InvalidMessages,
    InvalidPrompt,
    MessagesTooLong,
    NoChatTemplate,
    PromptTooLong,
    ToolMessagesUnsupported,
    ToolsUnsupported,
)
from worker.serve.text.prompt_size import size_bound
from worker.serve.text.prompts import end_id_of, prompt_tokens, text_tokens

Make = Callable[..., GenerateRequest]
HELLO = (Message(role="user", content="Who keeps the house?"),)


def tokens_of(request: GenerateRequest, **given: object) -> tuple[int, ...]:
    tokenizer = tiny_tokenizer()
    context = given.pop("context", Context(64))
    assert isinstance(context, Context)
    for name, value in given.items():
        setattr(tokenizer, name, value)
    return prompt_tokens(request, tokenizer, vocab_size=384, context=context)


def test_text_is_tokenised(make_request: Make) -> None:
    assert tokens_of(make_request(text="The still")) == tuple(
        tiny_tokenizer()("The still").input_ids
    )


def test_tokens_pass_as_they_are(make_request: Make) -> None:
    assert tokens_of(make_request(tokens=(3, 9, 27))) == (3, 9, 27)


def test_messages_are_rendered_with_the_assistants_turn_opened(make_request: Make) -> None:
    rendered = tiny_tokenizer().decode(tokens_of(make_request(messages=HELLO)))
    assert rendered == "<|im_start|>user\nWho keeps the house?<|im_end|>\n<|im_start|>assistant\n"


def test_a_developer_speaks_as_the_system_where_the_template_knows_none(make_request: Make) -> None:
    request = make_request(messages=(Message(role="developer", content="Be short."),))
    assert "<|im_start|>system\nBe short." in tiny_tokenizer().decode(tokens_of(request))


def test_a_model_without_a_template_refuses_messages(make_request: Make) -> None:
    with pytest.raises(NoChatTemplate, match="/v1/completions"):
        tokens_of(make_request(messages=HELLO), chat_template=None)


def test_what_the_template_raises_is_told(make_request: Make) -> None:
    with pytest.raises(InvalidMessages, match="roles must alternate"):
        tokens_of(
            make_request(messages=HELLO),
            chat_template="{{ raise_exception('roles must alternate') }}",
        )


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append({}) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(make_request: Make, attack: str) -> None:
    with pytest.raises(InvalidMessages):
        tokens_of(make_request(messages=HELLO), chat_template=attack)


def test_an_unknown_token_is_refused(make_request: Make) -> None:
    with pytest.raises(InvalidPrompt, match="token 384"):
        tokens_of(make_request(tokens=(1, 384)))
    with pytest.raises(InvalidPrompt, match="token -1"):
        tokens_of(make_request(tokens=(-1,)))


def test_an_empty_prompt_becomes_the_start_token(make_request: Make) -> None:
    assert tokens_of(make_request(text=""), bos_token="<|im_start|>") == (1,)


def test_an_empty_prompt_is_refused_where_there_is_no_start_token(make_request: Make) -> None:
    with pytest.raises(InvalidPrompt, match="empty"):
        tokens_of(make_request(tokens=()))


def test_prompt_and_answer_may_fill_the_context(make_request: Make) -> None:
    assert len(tokens_of(make_request(tokens=(5,) * 60, max_tokens=4))) == 60


def test_one_token_more_than_the_context_is_refused_with_the_numbers(make_request: Make) -> None:
    with pytest.raises(
        PromptTooLong, match=r"64 tokens, but 65 .*61 in the prompt, 4 for the answer"
    ) as caught:
        tokens_of(make_request(tokens=(5,) * 61, max_tokens=4))
    assert (caught.value.status, caught.value.code, caught.value.param) == (
        400,
        "context_length_exceeded",
        "prompt",
    )


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(make_request: Make) -> None:
    request, tokenizer = make_request(text="The still " * 10_000), tiny_tokenizer()
    bound = size_bound(tokenizer, end_id_of(tokenizer))
    assert bound is not None
    least = -(-100_000 // bound.max_bytes)
    with pytest.raises(
        PromptTooLong, match=rf"\(at least {least} in the prompt, 4 for the answer\)"
    ) as caught:
        prompt_tokens(request, tokenizer, vocab_size=384, context=Context(64), bound=bound)
    assert (caught.value.status, caught.value.code, caught.value.param) == (
        400,
        "context_length_exceeded",
        "prompt",
    )


def test_a_text_of_end_tokens_is_no_long_prompt(make_request: Make) -> None:
    tokenizer = tiny_tokenizer()
    request = make_request(text="The still" + tokenizer.eos_token * 10_000)
    bound = size_bound(tokenizer, end_id_of(tokenizer))
    found = prompt_tokens(request, tokenizer, vocab_size=384, context=Context(64), bound=bound)
    assert found == tuple(tokenizer("The still").input_ids)


def test_too_long_messages_name_the_messages(make_request: Make) -> None:
    with pytest.raises(MessagesTooLong) as caught:
        tokens_of(make_request(messages=HELLO, max_tokens=60))
    assert caught.value.param == "messages"


def test_a_request_that_takes_what_fits_needs_room_for_one_token(make_request: Make) -> None:
    assert len(tokens_of(make_request(tokens=(5,) * 63, max_tokens=4000, fits_context=True))) == 63
    with pytest.raises(PromptTooLong):
        tokens_of(make_request(tokens=(5,) * 64, max_tokens=4000, fits_context=True))


@pytest.mark.parametrize(
    ("kind", "has_encoder", "is_kept"),
    [
        ("unigram", True, True),
        ("unigram", False, False),
        ("wordpiece", True, True),
        ("wordpiece", False, True),
        ("roberta", False, True),
    ],
)
def test_an_end_token_behind_the_prompt_stays_where_it_separates_or_is_encoded(
    kind: str, has_encoder: bool, is_kept: bool
) -> None:
    tokenizer = tiny_tokenizer(kind)
    whole = tuple(tokenizer("The still").input_ids)
    assert whole[-1] == end_id_of(tokenizer)
    assert text_tokens("The still", tokenizer, has_encoder=has_encoder) == (
        whole if is_kept else whole[:-1]
    )


TOOLS = ToolUse(
    tools=(
        Tool(name="find", description="Finds.", parameters='{"type": "object"}', strict=True),
        Tool(name="stop"),
    )
)


def test_templates_get_tools_and_calls_as_hugging_face_gives_them(make_request: Make) -> None:
    call = ToolCall(id="c1", name="find", arguments='{"a": [1]}')
    messages = (
        Message(role="assistant", tool_calls=(call,)),
        Message(role="tool", tool_call_id="c1", content="x"),
    )
    template = "{{ tools | tojson }}\n{% for m in messages %}{{ m | tojson }}\n{% endfor %}"
    request = make_request(messages=messages, tool_use=TOOLS, max_tokens=1)
    tokens = tokens_of(request, chat_template=template, context=Context(4096))
    tools, assistant, tool = map(json.loads, tiny_tokenizer().decode(tokens).splitlines())
    assert tools == [
        {
            "type": "function",
            "function": {"name": "find", "description": "Finds.", "parameters": {"type": "object"}},
        },
        {
            "type": "function",
            "function": {"name": "stop", "parameters": {"type": "object", "properties": {}}},
        },
    ]
    assert assistant["content"] == ""
    assert assistant["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "find", "arguments": {"a": [1]}}}
    ]
    assert tool == {"role": "tool", "content": "x", "tool_call_id": "c1", "name": "find"}


@pytest.mark.parametrize("arguments", ["{", "[1]", '"a"'])
def test_arguments_that_are_no_object_reach_the_template_as_text(
    make_request: Make, arguments: str
) -> None:
    call = ToolCall(id="c", name="f", arguments=arguments)
    request = make_request(messages=(Message(role="assistant", tool_calls=(call,)),))
    template = "{{ tools or messages[0].tool_calls[0].function.arguments }}"
    assert tiny_tokenizer().decode(tokens_of(request, chat_template=template)) == arguments


def test_a_template_without_tools_refuses_them(make_request: Make) -> None:
    with pytest.raises(ToolsUnsupported, match="leave tools"):
        tokens_of(make_request(messages=HELLO, tool_use=TOOLS))
    with pytest.raises(ToolMessagesUnsupported):
        tokens_of(make_request(messages=(*HELLO, Message(role="tool", content="x"))))
    hidden = TOOLS.model_copy(update={"choice": "none"})
    assert tokens_of(make_request(messages=HELLO, tool_use=hidden)) == tokens_of(
        make_request(messages=HELLO)
    )


def test_the_template_for_tools_is_chosen_where_there_are_several(make_request: Make) -> None:
    templates = {"default": "plain", "tool_use": "{{ tools[0].function.name }}"}
    request = make_request(messages=HELLO, tool_use=TOOLS)
    assert tiny_tokenizer().decode(tokens_of(request, chat_template=templates)) == "find"
    assert (
        tiny_tokenizer().decode(tokens_of(make_request(messages=HELLO), chat_template=templates))
        == "plain"
    )


def test_variables_reach_the_template_but_not_its_special_tokens(make_request: Make) -> None:
    request = make_request(
        messages=HELLO, template_kwargs='{"is_short": true, "eos_token": "taken"}'
    )
    tokens = tokens_of(request, chat_template="{{ is_short }} {{ eos_token }}")
    assert tiny_tokenizer().decode(tokens) == "True <|im_end|>"


@pytest.mark.parametrize("has_system", [True, False])
def test_a_template_may_read_tools_from_the_system_message(
    make_request: Make, has_system: bool
) -> None:
    messages = (Message(role="system", content="Be short."), *HELLO)[0 if has_system else 1 :]
    request = make_request(messages=messages, tool_use=TOOLS)
    template = "{% for message in messages %}{% if message['tools'] %}{{ message['content'] }}|{{ message['tools'] }}{% endif %}{% endfor %}"
    text = tiny_tokenizer().decode(
        tokens_of(request, chat_template=template, context=Context(4096))
    )
    content, tools = text.split("|")
    assert content == ("Be short." if has_system else "")
    assert [tool["name"] for tool in json.loads(tools)] == ["find", "stop"]
