"""Generation over real HTTP, with a real serve worker process behind a real Valkey."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from app.contracts.generation import Sampling
from app.db.session import transaction
from app.errors import BadRequest
from app.services import model_registry
from app.services.generation import Order, validate_for_model
from app.settings import get_settings
from tests.app.api.conftest import PROJECT
from tests.serve_worker import WorkerProcess
from tests.waiting import wait_for

PROMPT = "What does a lantern mean?"


def streamed_text(stream: Any) -> str:  # Any: the client's generics say less than the name
    return "".join(chunk.choices[0].text for chunk in stream)


def test_a_streamed_completion_equals_the_whole_one(
    worker: WorkerProcess, client: openai.OpenAI
) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 64, "temperature": 0}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert len(chunks) > 10, "it came in one piece"
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_a_streamed_chat_equals_the_whole_one_and_ends_with_its_usage(
    worker: WorkerProcess, client: openai.OpenAI
) -> None:
    messages: Any = [{"role": "user", "content": PROMPT}]
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": messages,
        "max_tokens": 48,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**asked)
    stream = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        == whole.choices[0].message.content
    )
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_a_chat_without_max_tokens_takes_what_the_context_leaves(
    worker: WorkerProcess, client: openai.OpenAI
) -> None:
    messages: Any = [{"role": "user", "content": PROMPT}]
    answer = client.chat.completions.create(
        model="tiny", messages=messages, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.total_tokens == 256


def test_choices_with_a_seed_are_reproducible_and_differ(
    worker: WorkerProcess, client: openai.OpenAI
) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "prompt": [PROMPT, "The still"],
        "n": 3,
        "seed": 7,
        "max_tokens": 12,
    }
    first, again = (client.completions.create(**asked) for _ in range(2))
    assert [choice.index for choice in first.choices] == list(range(6))
    assert [choice.text for choice in first.choices] == [choice.text for choice in again.choices]
    assert len({choice.text for choice in first.choices}) == 6
    alone = client.completions.create(**asked | {"n": 1, "prompt": "The still"})
    assert alone.choices[0].text == first.choices[3].text


def test_a_key_does_not_wait_for_all_that_another_has_waiting(
    worker: WorkerProcess, client: openai.OpenAI, service: Any
) -> None:
    many: Any = {"model": "tiny", "prompt": [PROMPT] * 4, "n": 128, "max_tokens": 200}
    stream = client.completions.create(**many, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    with service.client() as other:
        answer = other.completions.create(model="tiny", prompt=PROMPT, max_tokens=8)
    assert answer.choices[0].finish_reason is not None
    wait_for(
        lambda: worker.status().num_waiting > 128, 1, "it waited for the other key's sequences"
    )
    stream.close()


def test_token_prompts_are_taken_as_they_are(worker: WorkerProcess, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    one = client.completions.create(**asked, prompt=[40, 41, 42])
    two = client.completions.create(**asked, prompt=[[40, 41, 42], [50, 51]])
    assert one.usage is not None
    assert one.usage.prompt_tokens == 3
    assert two.choices[0].text == one.choices[0].text
    assert two.usage is not None
    assert two.usage.prompt_tokens == 5


def test_log_probabilities_come_in_the_shape_of_each_route(
    worker: WorkerProcess, client: openai.OpenAI
) -> None:
    text = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=6, temperature=0, logprobs=2
    )
    given = text.choices[0].logprobs
    assert given is not None
    assert given.tokens is not None
    assert given.token_logprobs is not None
    assert given.top_logprobs is not None
    assert len(given.tokens) == len(given.token_logprobs) == 6
    assert all(
        max(top.values()) == lp
        for top, lp in zip(given.top_logprobs, given.token_logprobs, strict=True)
    )
    messages: Any = [{"role": "user", "content": PROMPT}]
    chat = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    assert chat.choices[0].logprobs is not None
    content = chat.choices[0].logprobs.content
    assert content is not None
    assert len(content) == 6
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob


def test_penalties_and_biases_reach_the_model(worker: WorkerProcess, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "prompt": PROMPT,
        "max_tokens": 8,
        "temperature": 0,
        "logprobs": 0,
    }

    def tokens(**given: Any) -> list[str]:  # Any: parameters of the client
        found = client.completions.create(**asked | given).choices[0].logprobs
        return found.tokens or [] if found is not None else []

    same = tokens(logit_bias={"40": 100})
    assert len(set(same)) == 1
    assert len(same) == 8
    penalised = {"presence_penalty": 2.0, "extra_body": {"repetition_penalty": 10.0}}
    assert len(set(tokens(logit_bias={"40": 20}, **penalised))) > 1
    assert len(set(tokens(frequency_penalty=2.0, presence_penalty=2.0, logit_bias={"40": 20}))) > 1
    with pytest.raises(openai.BadRequestError, match="99999") as unknown:
        tokens(logit_bias={"99999": 1})
    assert unknown.value.param == "logit_bias"


def test_min_p_of_one_is_greedy(worker: WorkerProcess, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12}
    drawn = client.completions.create(**asked, temperature=2, extra_body={"min_p": 1.0})
    assert (
        drawn.choices[0].text == client.completions.create(**asked, temperature=0).choices[0].text
    )


def test_a_chat_goes_on_for_min_tokens(
    worker: WorkerProcess, client: openai.OpenAI, tiny_llama_dir: Path
) -> None:
    eos = json.loads((tiny_llama_dir / "config.json").read_text())["eos_token_id"]
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=12,
        logit_bias={str(eos): 100},
        extra_body={"min_tokens": 5},
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6
    assert answer.choices[0].finish_reason == "stop"


def test_echo_puts_the_prompt_first(worker: WorkerProcess, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "prompt": [PROMPT, "The still"],
        "max_tokens": 6,
        "temperature": 0,
    }
    plain = client.completions.create(**asked)
    echoed = client.completions.create(**asked, echo=True)
    assert [choice.text for choice in echoed.choices] == [
        prompt + choice.text for prompt, choice in zip(asked["prompt"], plain.choices, strict=True)
    ]
    stream = client.completions.create(**asked | {"prompt": PROMPT}, echo=True, stream=True)
    assert streamed_text(stream) == echoed.choices[0].text


def test_best_of_gives_the_likeliest(worker: WorkerProcess, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "prompt": PROMPT,
        "max_tokens": 6,
        "seed": 5,
        "logprobs": 0,
    }
    asked |= {"extra_body": {"ignore_eos": True}}
    everyone = client.completions.create(**asked, n=6)
    best = client.completions.create(**asked, n=2, best_of=6)

    def total(choice: Any) -> float:  # Any: the client's choice
        return math.fsum(choice.logprobs.token_logprobs)

    ranked = sorted(everyone.choices, key=total, reverse=True)
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked[:2]]
    assert [choice.index for choice in best.choices] == [0, 1]
    assert best.usage is not None
    assert everyone.usage is not None
    assert best.usage.total_tokens == everyone.usage.total_tokens


def test_a_stop_string_ends_the_text_before_it(
    worker: WorkerProcess, client: openai.OpenAI
) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    text = client.completions.create(**asked).choices[0].text
    stop = text[10:13]
    stopped = client.completions.create(**asked, stop=["never in it", stop])
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    assert (
        streamed_text(client.completions.create(**asked, stop=stop, stream=True))
        == text[: text.index(stop)]
    )


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_stop_token_ends_a_completion_and_a_chat(
    worker: WorkerProcess, client: openai.OpenAI, is_streamed: bool
) -> None:
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "temperature": 0, "n": 2}
    asked |= {"logit_bias": {"40": 100}, "stream": is_streamed}
    stopped = {"stop_token_ids": [41, 40], "min_tokens": 5, "ignore_eos": True}
    messages: Any = [{"role": "user", "content": PROMPT}]

    def endings(extra_body: dict[str, Any]) -> list[str]:
        text = client.completions.create(**asked, prompt=PROMPT, extra_body=extra_body)
        chat = client.chat.completions.create(**asked, messages=messages, extra_body=extra_body)
        chunks = [*text, *chat] if is_streamed else [text, chat]
        choices = [choice for chunk in chunks for choice in chunk.choices]
        return [choice.finish_reason for choice in choices if choice.finish_reason]

    assert endings(stopped) == ["stop"] * 4
    assert endings({"ignore_eos": True}) == ["length"] * 4


def test_a_stop_token_has_no_text_and_is_counted(
    worker: WorkerProcess, client: openai.OpenAI
) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    asked |= {"logit_bias": {"40": 100}, "logprobs": 0}
    options = {"stop_token_ids": [40], "min_tokens": 5, "ignore_eos": True}
    answer = client.completions.create(**asked, extra_body=options)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.tokens or []) == 5
    stream = client.completions.create(**asked, stream=True, extra_body=options)
    assert streamed_text(stream) == answer.choices[0].text
    with pytest.raises(openai.BadRequestError, match="99999") as unknown:
        client.completions.create(**asked, extra_body={"stop_token_ids": [99_999]})
    assert unknown.value.param == "stop_token_ids"


def test_what_is_wrong_with_a_request_is_an_http_error_even_of_a_stream(
    worker: WorkerProcess, client: openai.OpenAI, register: Callable[..., str]
) -> None:
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt="lamp " * 300, max_tokens=8, stream=True)
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError) as unknown:
        client.completions.create(model="tiny", prompt=[100_000], max_tokens=8)
    assert unknown.value.param == "prompt"


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"suffix": "x"}, "unsupported_parameter", "suffix"),
        ({"best_of": 2, "n": 3}, "invalid_value", "best_of"),
        ({"best_of": 3, "stream": True}, "invalid_value", "best_of"),
        ({"best_of": 129}, "invalid_value", "best_of"),
        ({"presence_penalty": 2.5}, "invalid_value", "presence_penalty"),
        ({"frequency_penalty": -2.5}, "invalid_value", "frequency_penalty"),
        ({"repetition_penalty": 0}, "invalid_value", "repetition_penalty"),
        ({"repetition_penalty": 11}, "invalid_value", "repetition_penalty"),
        ({"logit_bias": {"5": 101}}, "invalid_value", "logit_bias.5"),
        ({"logit_bias": {"x": 1}}, "invalid_value", "logit_bias.x"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "invalid_value", "logit_bias"),
        ({"min_p": 1.5}, "invalid_value", "min_p"),
        ({"min_p": True}, "invalid_value", "min_p"),
        ({"min_tokens": "0"}, "invalid_value", "min_tokens"),
        ({"stream": "true"}, "invalid_value", "stream"),
        ({"min_tokens": -1}, "invalid_value", "min_tokens"),
        ({"min_tokens": 17}, "invalid_value", "min_tokens"),
        ({"min_tokens": 9, "max_tokens": 8}, "invalid_value", "min_tokens"),
        ({"temperature": 2.5}, "invalid_value", "temperature"),
        ({"n": 129}, "invalid_value", "n"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_tokens": 256}, "context_length_exceeded", "max_tokens"),
        ({"stop": ["a"] * 65}, "invalid_value", "stop"),
        ({"stop_token_ids": list(range(65))}, "invalid_value", "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "invalid_value", "stop_token_ids[0]"),
        ({"stop_token_ids": ["5"]}, "invalid_value", "stop_token_ids[0]"),
        ({"stop_token_ids": 5}, "invalid_value", "stop_token_ids"),
        ({"prompt": []}, "invalid_value", "prompt"),
        ({"prompt": [1, "a"]}, "invalid_value", "prompt"),
        ({"prompt": None}, "invalid_value", "prompt"),
        ({"model": "absent"}, "model_not_found", "model"),
        ({"model": "bert"}, "model_not_servable", "model"),
        ({"model": "t5", "max_tokens": 257}, "context_length_exceeded", "max_tokens"),
    ],
    ids=lambda given: str(given)[:60],
)
def test_a_bad_completion_request_names_what_is_wrong(
    http: httpx.Client,
    register: Callable[..., str],
    change: dict[str, object],
    code: str,
    param: str,
) -> None:
    register()
    register("bert", architecture="bert", family="masked")
    register("t5", architecture="t5", family="seq2seq")
    error = http.post("/v1/completions", json={"model": "tiny", "prompt": PROMPT} | change).json()[
        "error"
    ]
    assert (error["code"], error["param"]) == (code, param)


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "invalid_value", "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "missing_required_parameter", "messages[0].content"),
        ({"functions": [{"name": "f"}]}, "unsupported_parameter", "functions"),
        ({"guided_json": {}}, "unsupported_parameter", "guided_json"),
        ({"prompt": "x"}, "unknown_parameter", "prompt"),
        ({"echo": True}, "unknown_parameter", "echo"),
        ({"min_tokens": 9, "max_completion_tokens": 8}, "invalid_value", "min_tokens"),
        ({"stop_token_ids": list(range(65))}, "invalid_value", "stop_token_ids"),
        ({"model": "plain"}, "no_chat_template", "messages"),
        ({"model": "bert"}, "model_not_servable", "model"),
    ],
    ids=str,
)
def test_a_bad_chat_request_names_what_is_wrong(
    http: httpx.Client,
    register: Callable[..., str],
    change: dict[str, object],
    code: str,
    param: str,
) -> None:
    register()
    register("plain", has_chat_template=False)
    register("bert", architecture="bert", family="masked", has_chat_template=False)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]} | change
    error = http.post("/v1/chat/completions", json=body).json()["error"]
    assert (error["code"], error["param"]) == (code, param)


def test_parameters_without_effect_are_accepted(
    worker: WorkerProcess, client: openai.OpenAI
) -> None:
    first = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=4
    )
    said: Any = first.choices[0].message.model_dump()
    answer = client.chat.completions.create(
        model="tiny",
        messages=[
            {
                "role": "developer",
                "content": [
                    {
                        "type": "text",
                        "text": "Be short.",
                        "prompt_cache_breakpoint": {"mode": "explicit"},
                    }
                ],
                "name": "boss",
            },
            said
            # as replies of OpenAI have, and the SDK's streams
            | {
                "annotations": [],
                "parsed": None,
            },
        ],
        prompt_cache_options={"mode": "explicit"},
        moderation=None,
        max_completion_tokens=4,
        store=True,
        metadata={"a": "b"},
        user="me",
        presence_penalty=0,
        frequency_penalty=0.0,
        logit_bias={},
        response_format={"type": "text"},
        tool_choice="none",
    )
    assert answer.choices[0].finish_reason in {"stop", "length"}


def test_top_p_0_takes_the_best_token(worker: WorkerProcess, client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "prompt": "What is a still?", "max_tokens": 12}
    greedy = client.completions.create(**asked, temperature=0).choices[0].text
    assert client.completions.create(**asked, temperature=2, top_p=0).choices[0].text == greedy


def test_the_models_of_another_project_do_not_exist(
    service: Any, register: Callable[..., str]
) -> None:
    register("theirs", project_id="other")
    with service.http() as http:
        answers = [
            http.post("/v1/completions", json={"model": name, "prompt": "x"})
            for name in ("theirs", "absent")
        ]
    assert [answer.status_code for answer in answers] == [404, 404]
    bodies = [json.dumps(answer.json()).replace("theirs", "absent") for answer in answers]
    assert bodies[0] == bodies[1]


def test_a_key_without_the_scope_cannot_generate(
    service: Any, register: Callable[..., str]
) -> None:
    register()
    with service.http(service.new_key(scopes=["models:read"])) as http:
        response = http.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
    assert response.status_code == 403


def test_an_encoder_decoders_answer_may_fill_a_context_of_its_own(
    service: Any, register: Callable[..., str]
) -> None:
    register("t5", architecture="t5", family="seq2seq")
    register("tiny")

    def order(model_id: str, max_tokens: int) -> Order:
        with transaction() as session:
            model = model_registry.resolve(session, PROJECT, model_id)
        return Order("id", "key", model, [PROMPT], 1, Sampling(max_tokens=max_tokens))

    settings = get_settings()
    validate_for_model(order("t5", 256), settings)
    with pytest.raises(BadRequest, match="prompt and answer together have at most 256"):
        validate_for_model(order("tiny", 256), settings)
    with pytest.raises(BadRequest, match="an answer has at most 256"):
        validate_for_model(order("t5", 257), settings)


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_an_answer_that_would_be_too_large_is_refused_before_it_is_begun(
    worker: WorkerProcess, http: httpx.Client, path: str
) -> None:
    is_chat = path.startswith("chat")
    name = "top_logprobs" if is_chat else "logprobs"
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}], "logprobs": True}
    body = {
        "model": "tiny",
        "max_tokens": 200,
        "n": 60,
        **(asked if is_chat else {"prompt": "a"}),
        name: 20,
    }
    answer = http.post(f"/v1/{path}", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("answer_too_large", name)
    assert all(word in error["message"] for word in ("16,777,216", "max_tokens", "n,", name))
    assert (
        http.post(f"/v1/{path}", json=body | {"n": 1, "stream": True, "max_tokens": 2}).status_code
        == 200
    )


@pytest.mark.parametrize("change", [{"n": 128, "stream": True}, {"best_of": 128}])
def test_the_scores_of_an_echoed_prompt_count_for_each_choice(
    worker: WorkerProcess, http: httpx.Client, change: dict[str, Any]
) -> None:
    asked = {"model": "tiny", "prompt": [5] * 200, "max_tokens": 1, "echo": True, "logprobs": 20}
    answer = http.post("/v1/completions", json=asked | change)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("answer_too_large", "logprobs")
    assert ("stream the answer" in error["message"]) == ("stream" not in change)
    assert http.post("/v1/completions", json=asked | {"stream": True}).status_code == 200
