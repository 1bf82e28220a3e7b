"""The unmodified `openai` client uses the Responses API, echoed prompts and tokenizers of a service."""

import asyncio
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.service import TEACHER, Service

pytestmark = pytest.mark.e2e
REQUEST: dict[str, Any] = {"model": TEACHER, "input": "What is a lantern?", "temperature": 0}


def test_a_response_equals_its_stream_and_the_same_chat(client: openai.OpenAI) -> None:
    request = {**REQUEST, "max_output_tokens": 24}
    response = client.responses.create(**request)
    chat = client.chat.completions.create(
        model=TEACHER,
        messages=[{"role": "user", "content": "What is a lantern?"}],
        max_tokens=24,
        temperature=0,
    )
    assert response.output_text == chat.choices[0].message.content
    events = list(client.responses.create(**request, stream=True))
    last = events[-1]
    assert last.type in {"response.completed", "response.incomplete"}
    assert last.response.output_text == response.output_text
    assert last.response.usage is not None
    assert response.usage is not None
    assert last.response.usage.output_tokens == response.usage.output_tokens


async def count_and_create(service: Service) -> tuple[int, int]:
    """Returns the tokens that are counted in advance, and those of the response."""
    url = f"{service.url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key=service.key) as client:
        counted = await client.responses.input_tokens.count(model=TEACHER, input="What is it?")
        response = await client.responses.create(
            model=TEACHER, input="What is it?", max_output_tokens=1
        )
    assert response.usage is not None
    return counted.input_tokens, response.usage.input_tokens


def test_the_async_client_counts_the_tokens_that_a_response_reads(service: Service) -> None:
    counted, read = asyncio.run(count_and_create(service))
    assert counted == read


def test_a_log_likelihood_is_that_of_the_tokens_that_the_service_names(
    service: Service, client: openai.OpenAI
) -> None:
    with httpx.Client(
        base_url=service.url, headers={"Authorization": f"Bearer {service.key}"}
    ) as http:
        body = {"model": TEACHER, "prompt": "What is a lantern?", "add_special_tokens": False}
        tokens = http.post("/tokenize", json=body).json()["tokens"]
        info = http.get("/tokenizer_info", params={"model": TEACHER}).json()
    assert isinstance(info["eos_token"], str)
    echoed = client.completions.create(
        model=TEACHER, prompt=tokens, max_tokens=1, logprobs=1, echo=True, temperature=0
    )
    assert echoed.choices[0].text.startswith("What is a lantern?")
    logprobs: Any = echoed.choices[0].logprobs
    assert len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(tokens) + 1
