"""Accuracy, macro-F1 and requests per second of a served model, with intervals over the notices."""

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from app.commands.demo import call
from examples.licences.prepare_rows import CLASSES

NUM_CALLERS = 16
NUM_RESAMPLES = 1000
Json = dict[str, Any]  # Any: JSON bodies of the public API
Pairs = Sequence[tuple[str, str]]  # answers and labels


@dataclass(frozen=True)
class Score:
    """A figure with its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Measured:
    """Size of one model, what it answered, and how fast."""

    model: str
    num_parameters: int
    file_bytes: int
    memory_bytes: int  # of the weights in the serve worker
    accuracy: Score
    macro_f1: Score
    requests_per_second: float


def read_messages(path: Path) -> list[list[Json]]:
    return [json.loads(line)["messages"] for line in path.read_text().splitlines()]


def ask_all(
    client: httpx.Client, model: str, prompts: Sequence[list[Json]]
) -> tuple[list[str], float]:
    """Returns the answers of `NUM_CALLERS` concurrent callers, and the requests per second."""
    return asyncio.run(_ask_all(str(client.base_url), dict(client.headers), model, prompts))


async def _ask_all(
    url: str, headers: dict[str, str], model: str, prompts: Sequence[list[Json]]
) -> tuple[list[str], float]:
    answers = [""] * len(prompts)
    numbers = iter(range(len(prompts)))

    async def call_in_turn(client: httpx.AsyncClient) -> None:
        """Sends one request after the other until none is left."""
        for number in numbers:
            body = {
                "model": model,
                "messages": prompts[number],
                "temperature": 0,
                "max_tokens": 8,
                "structured_outputs": {"choice": CLASSES},
            }
            answer = await client.post("/v1/chat/completions", json=body)
            answer.raise_for_status()
            answers[number] = answer.json()["choices"][0]["message"]["content"]

    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=120) as client:
        began = time.perf_counter()
        await asyncio.gather(*(call_in_turn(client) for _ in range(NUM_CALLERS)))
        seconds = time.perf_counter() - began
    return answers, len(prompts) / seconds


def measure(client: httpx.Client, model: str, path: Path) -> Measured:
    """Asks the model about every notice of a file. The first requests load the model."""
    rows = read_messages(path)
    prompts = [messages[:2] for messages in rows]
    labels = [messages[2]["content"] for messages in rows]
    ask_all(client, model, prompts[: 2 * NUM_CALLERS])
    answers, speed = ask_all(client, model, prompts)
    pairs = list(zip(answers, labels, strict=True))
    facts = call(client, "GET", f"/v1/models/{model}")
    workers = call(client, "GET", f"/v1/models/{model}/status")["workers"]
    return Measured(
        model,
        facts["num_parameters"],
        facts["size_bytes"],
        max(worker["bytes"] for worker in workers),
        bootstrap(accuracy, pairs),
        bootstrap(macro_f1, pairs),
        speed,
    )


def accuracy(pairs: Pairs) -> float:
    return sum(answer == label for answer, label in pairs) / len(pairs)


def macro_f1(pairs: Pairs) -> float:
    """Returns the mean F1 of the classes that occur."""
    scores = []
    for name in CLASSES:
        hits = sum(answer == label == name for answer, label in pairs)
        said = sum(answer == name for answer, _ in pairs)
        meant = sum(label == name for _, label in pairs)
        if said or meant:
            scores.append(2 * hits / (said + meant))
    return sum(scores) / len(scores)


def bootstrap(figure: Callable[[Pairs], float], pairs: Pairs) -> Score:
    """Returns a figure with its interval over resampled answers."""
    rng = random.Random(0)
    values = sorted(figure(rng.choices(pairs, k=len(pairs))) for _ in range(NUM_RESAMPLES))
    low, high = values[NUM_RESAMPLES // 40], values[-NUM_RESAMPLES // 40]
    return Score(figure(pairs), low, high)
