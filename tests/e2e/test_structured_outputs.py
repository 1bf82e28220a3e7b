"""The unmodified `openai` client gets structured outputs from a running service."""

import enum
import json
import re
from typing import Annotated, Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from tests.e2e.service import TEACHER

pytestmark = pytest.mark.e2e
MESSAGES: Any = [{"role": "user", "content": "Describe the lantern as json."}]


class Kind(enum.Enum):
    LAMP = "lamp"
    JAR = "jar"


class Part(BaseModel):
    kind: Kind
    size: int = Field(ge=0, le=999)


class Lantern(BaseModel):
    """A schema as applications write it: nested, with optional values, unions and references."""

    name: str = Field(max_length=4)
    parts: list[Part] = Field(max_length=2)
    best: Part | None
    is_warm: bool | None
    shade: Literal["red", "green"] | Annotated[int, Field(ge=0, le=99)]


def test_parse_validates_every_answer(client: openai.OpenAI) -> None:
    completion = client.chat.completions.parse(
        model=TEACHER,
        messages=MESSAGES,
        response_format=Lantern,
        n=50,
        seed=1,
        temperature=1.0,
        max_completion_tokens=200,
    )
    answers = [choice.message.parsed for choice in completion.choices]
    assert len(answers) == 50
    assert all(isinstance(answer, Lantern) for answer in answers)


def test_a_stream_ends_with_the_parsed_answer(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=TEACHER,
        messages=MESSAGES,
        response_format=Lantern,
        seed=2,
        max_completion_tokens=200,
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Lantern)
    assert kinds.count("content.delta") > 3


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"choice": ["a.b", "left | right"]}, r"a\.b|left \| right"),
        ({"regex": "[0-9]{3}-[a-f]{2}"}, "[0-9]{3}-[a-f]{2}"),
        ({"grammar": 'start: "x" /[0-9]/'}, "x[0-9]"),
        ({"json": {"enum": ["p", 7]}}, '"p"|7'),
    ],
)
def test_structured_outputs_of_vllm_work_on_both_routes(
    constraint: Any, pattern: str, client: openai.OpenAI
) -> None:
    extra = {"structured_outputs": constraint}
    chat = client.chat.completions.create(
        model=TEACHER, messages=MESSAGES, extra_body=extra, max_tokens=30
    )
    text = client.completions.create(
        model=TEACHER, prompt="The still", extra_body=extra, max_tokens=30
    )
    assert re.fullmatch(pattern, chat.choices[0].message.content or "")
    assert re.fullmatch(pattern, text.choices[0].text)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"guided_json": {}}, "guided_json", "structured_outputs"),
        ({"structured_outputs": {"regex": "a(?=b)"}}, "structured_outputs", "look-around"),
        (
            {"structured_outputs": {"grammar": "start: ("}},
            "structured_outputs",
            "cannot be enforced",
        ),
        (
            {"structured_outputs": {"regex": "a", "choice": ["b"]}},
            "structured_outputs",
            "exactly one",
        ),
        (
            {"structured_outputs": {"json": {"type": "array", "uniqueItems": True}}},
            "structured_outputs",
            "uniqueItems",
        ),
        (
            {"response_format": {"type": "json_object"}, "ignore_eos": True},
            "ignore_eos",
            "ignore_eos",
        ),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(
    fields: Any, param: str, message: str, client: openai.OpenAI
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=TEACHER, messages=MESSAGES, extra_body=fields)
    assert caught.value.param == param
    assert message in str(caught.value)


def test_json_object_gives_an_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=TEACHER,
        messages=MESSAGES,
        response_format={"type": "json_object"},
        max_tokens=200,
        seed=3,
    )
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)
    else:
        assert (answer.choices[0].message.content or "").startswith("{")
