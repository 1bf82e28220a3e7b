"""The routes about tokenizers, and echoed prompts with log-probabilities, over real HTTP."""

from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from transformers import AutoTokenizer

from tests.app.api.conftest import Service
from tests.serve_worker import WorkerProcess

TEXT = "What does a lantern mean?"


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir: Path) -> Any:  # Any: transformers is untyped here
    return AutoTokenizer.from_pretrained(tiny_llama_dir)


def test_text_becomes_tokens_and_text_again(
    worker: WorkerProcess, http: httpx.Client, tokenizer: Any
) -> None:
    for adds in (True, False):
        body = {"prompt": TEXT, "add_special_tokens": adds}
        answer = http.post("/tokenize", json=body).json()
        assert answer["tokens"] == tokenizer(TEXT, add_special_tokens=adds).input_ids
        assert answer["count"] == len(answer["tokens"])
        assert answer["max_model_len"] == 256
        text = http.post("/detokenize", json={"tokens": answer["tokens"], "model": "tiny"}).json()
        assert text == {"prompt": tokenizer.decode(answer["tokens"])}
    assert http.post("/tokenize", json={"prompt": ""}).status_code == 200


def test_a_text_longer_than_the_context_is_tokenised_completely(
    worker: WorkerProcess, http: httpx.Client, tokenizer: Any
) -> None:
    text = "lantern " * 3000
    assert (
        http.post("/tokenize", json={"prompt": text}).json()["tokens"] == tokenizer(text).input_ids
    )


def test_the_special_tokens_and_the_template_are_described(
    worker: WorkerProcess, http: httpx.Client, tokenizer: Any
) -> None:
    described = http.get("/tokenizer_info").json()
    assert described["eos_token"] == tokenizer.eos_token
    assert described["chat_template"] == tokenizer.chat_template


def test_the_model_must_be_named_if_there_are_several(
    worker: WorkerProcess, http: httpx.Client, register: Any
) -> None:
    register("other")
    answer = http.post("/tokenize", json={"prompt": TEXT})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
    assert http.post("/tokenize", json={"prompt": TEXT, "model": "tiny"}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, None),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, None),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/detokenize", {"tokens": [1_000_000]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
    ],
)
def test_a_wrong_request_is_refused(
    worker: WorkerProcess, http: httpx.Client, path: str, body: Any, param: str | None
) -> None:
    answer = http.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_input_tokens_are_counted_as_they_are_read(
    worker: WorkerProcess, client: openai.OpenAI
) -> None:
    counted = client.responses.input_tokens.count(
        model="tiny", input=TEXT, instructions="Be brief."
    )
    response = client.responses.create(
        model="tiny", input=TEXT, instructions="Be brief.", max_output_tokens=1
    )
    assert response.usage is not None
    assert counted.input_tokens == response.usage.input_tokens


def test_log_likelihoods_have_the_form_that_the_evaluation_harness_reads(
    worker: WorkerProcess, client: openai.OpenAI, tokenizer: Any
) -> None:
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in (TEXT, "The still")]
    answer = client.completions.create(
        model="tiny", prompt=prompts, max_tokens=1, logprobs=1, echo=True, seed=1234, temperature=0
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        assert choice.logprobs is not None
        values: Any = choice.logprobs.token_logprobs
        top: Any = choice.logprobs.top_logprobs
        assert len(values) == len(top) == len(prompt) + 1
        assert values[0] is top[0] is None
        assert all(isinstance(value, float) for value in values[1:])
        assert all(
            entry and max(entry.values()) >= value
            for entry, value in zip(top[1:], values[1:], strict=True)
        )
        assert values[-1] == max(top[-1].values())  # the answer is greedy
    only = client.completions.create(
        model="tiny", prompt=prompts, max_tokens=0, logprobs=1, echo=True
    )
    for prompt, choice, with_answer in zip(prompts, only.choices, answer.choices, strict=True):
        assert choice.logprobs is not None
        assert with_answer.logprobs is not None
        assert len(choice.logprobs.token_logprobs or ()) == len(prompt)
        expected: Any = with_answer.logprobs.token_logprobs
        values = choice.logprobs.token_logprobs
        assert values[1:] == pytest.approx(expected[1:-1], abs=1e-4)
        assert choice.text == tokenizer.decode(prompt)
    assert only.usage is not None
    assert only.usage.completion_tokens == 0


def test_a_streamed_echo_has_the_same_log_probabilities(
    worker: WorkerProcess, client: openai.OpenAI
) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": TEXT * 8, "max_tokens": 2}
    options |= {"logprobs": 20, "echo": True, "temperature": 0}
    expected = client.completions.create(**options).choices[0]
    chunks = list(client.completions.create(**options, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected.text
    streamed = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    values: list[Any] = [value for part in streamed for value in part.token_logprobs or ()]
    assert expected.logprobs is not None
    expected_values: Any = expected.logprobs.token_logprobs
    assert values[0] is expected_values[0] is None
    assert values[1:] == pytest.approx(expected_values[1:], abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "echo": True, "best_of": 2}, "best_of"),
        ({"prompt": [[40] * 200] * 100, "echo": True, "logprobs": 20, "n": 128}, "logprobs"),
    ],
)
def test_an_echo_that_cannot_be_answered_is_refused(
    worker: WorkerProcess, client: openai.OpenAI, changes: Any, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**{"model": "tiny", "prompt": TEXT, **changes})
    assert refused.value.param == param


def test_headers_and_errors_are_those_of_openai(service: Service, http: httpx.Client) -> None:
    answer = http.get("/v1/models")
    assert answer.headers["openai-version"] == "2020-10-01"
    assert answer.headers["openai-organization"] == "acme"
    assert answer.headers["openai-processing-ms"].isdecimal()
    with service.client("sk-wrong") as stranger, pytest.raises(openai.AuthenticationError) as bad:
        stranger.models.list()
    assert (bad.value.type, bad.value.code) == ("invalid_request_error", "invalid_api_key")
