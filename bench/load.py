"""Callers of a chat route: each streams its requests one after the other, all callers at once."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import httpx

from bench.cases import Entry

REQUEST_SECONDS = 300.0


@dataclass(frozen=True)
class Target:
    """Where a server answers, and what it calls the model."""

    url: str
    model: str
    key: str = "none"


@dataclass(frozen=True)
class Answer:
    """What one request got; seconds since it was sent."""

    prompt: str
    text: str
    first_seconds: float
    gaps: tuple[float, ...]


@dataclass(frozen=True)
class Load:
    answers: tuple[Answer, ...]
    seconds: float


def drive(
    target: Target, prompts: Sequence[str], *, num_callers: int, requests_each: int, max_tokens: int
) -> Load:
    """Prompts are dealt out in turn, so that every server gets the same ones from the same caller."""
    return asyncio.run(_drive(target, prompts, num_callers, requests_each, max_tokens))


async def _drive(
    target: Target, prompts: Sequence[str], num_callers: int, requests_each: int, max_tokens: int
) -> Load:
    limits = httpx.Limits(max_connections=None)
    headers = {"Authorization": f"Bearer {target.key}"}
    async with httpx.AsyncClient(
        limits=limits, headers=headers, timeout=REQUEST_SECONDS, trust_env=False
    ) as client:

        async def call(caller: int) -> list[Answer]:
            mine = [
                prompts[(caller + i * num_callers) % len(prompts)] for i in range(requests_each)
            ]
            return [await ask_anew(client, target, prompt, max_tokens) for prompt in mine]

        began = time.perf_counter()
        answers = await asyncio.gather(*(call(caller) for caller in range(num_callers)))
        seconds = time.perf_counter() - began
    return Load(tuple(answer for mine in answers for answer in mine), seconds)


async def ask_anew(
    client: httpx.AsyncClient, target: Target, prompt: str, max_tokens: int
) -> Answer:
    """`ask`, once more where a server ended a kept connection just then (llama.cpp's does)."""
    try:
        return await ask(client, target, prompt, max_tokens)
    except httpx.RemoteProtocolError:
        return await ask(client, target, prompt, max_tokens)


async def ask(client: httpx.AsyncClient, target: Target, prompt: str, max_tokens: int) -> Answer:
    """One streamed chat completion, greedy. Raises httpx.HTTPStatusError, or RuntimeError for an empty answer."""
    body = {
        "model": target.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "stream": True,
    }
    began = time.perf_counter()
    arrivals: list[float] = []
    pieces: list[str] = []
    async with client.stream("POST", f"{target.url}/v1/chat/completions", json=body) as response:
        if response.is_error:
            await response.aread()
            raise RuntimeError(f"{response.status_code}: {response.text[:300]}")
        async for chunk in chunks_of(response):
            text = "".join(
                choice["delta"].get("content") or "" for choice in chunk.get("choices", ())
            )
            if text:
                arrivals.append(time.perf_counter() - began)
                pieces.append(text)
    if not pieces:
        raise RuntimeError(f"no text came back for {prompt!r}")
    gaps = tuple(later - earlier for earlier, later in pairwise(arrivals))
    return Answer(prompt, "".join(pieces), arrivals[0], gaps)


async def chunks_of(response: httpx.Response) -> AsyncIterator[Entry]:
    async for line in response.aiter_lines():
        if line.startswith("data:") and (data := line.removeprefix("data:").strip()) != "[DONE]":
            yield json.loads(data)
