"""Prompts all along a trial: each gets the text that it always has, or an error that says so; none is left waiting."""

import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import httpx

from tests.faults.system import TEACHER, wait_until
from tests.faults.trial import PROBE_SECONDS, Trial

HANG_SECONDS: Final = 60.0
# Any: a body of JSON
ASKED: Final[dict[str, Any]] = {
    "model": TEACHER,
    "prompt": "What is it?",
    "max_tokens": 48,
    "temperature": 0,
}
ASKED["ignore_eos"] = True


@contextmanager
def prompts_asked(trial: Trial) -> Iterator[None]:
    """One after the other, whole and streamed in turn; notes what came of them."""
    texts: list[str] = []

    def has_text() -> bool:
        answer = trial.client.call("POST", "/v1/completions", json=ASKED)
        if answer is not None and answer.status_code == 200:
            texts.append(answer.json()["choices"][0]["text"])
        return bool(texts)

    wait_until(has_text, PROBE_SECONDS, "prompts are not answered before any fault")
    is_over = threading.Event()
    asking = threading.Thread(target=_ask, args=(trial, texts[0], is_over), daemon=True)
    asking.start()
    try:
        yield
    finally:
        is_over.set()
        asking.join(HANG_SECONDS + 10)
        if "prompts" not in trial.notes:
            trial.wrongs.append("prompts were not asked to the end")


def _ask(trial: Trial, text: str, is_over: threading.Event) -> None:
    told: Counter[str] = Counter(dict.fromkeys(("answered", "refused", "cut"), 0))
    with httpx.Client(
        headers={"Authorization": f"Bearer {trial.system.key}"},
        timeout=HANG_SECONDS,
        trust_env=False,
    ) as client:
        for number in itertools.count():
            if is_over.is_set():
                break
            url = trial.system.api_urls[number % len(trial.system.api_urls)]
            try:
                got = (_streamed if number // 2 % 2 else _whole)(client, f"{url}/v1/completions")
                told["refused" if got is None else "answered"] += 1
                if got not in {None, text}:
                    trial.wrongs.append(f"a prompt got {got!r} where it always got {text!r}")
            except httpx.ReadTimeout:
                trial.wrongs.append(f"a prompt was not answered in {HANG_SECONDS:.0f} s")
            except httpx.TransportError:
                told["cut"] += 1
            is_over.wait(0.3)
    trial.notes["prompts"] = dict(told)


def _whole(client: httpx.Client, url: str) -> str | None:
    """The text; None of an error."""
    answer = client.post(url, json=ASKED)
    return answer.json()["choices"][0]["text"] if answer.status_code == 200 else None


def _streamed(client: httpx.Client, url: str) -> str | None:
    """The text of a stream that came to its end; None of one that ended with an error."""
    pieces: list[str] = []
    deadline = time.monotonic() + HANG_SECONDS
    with client.stream("POST", url, json=ASKED | {"stream": True}) as answer:
        for line in answer.iter_lines():
            if time.monotonic() > deadline:  # signs of life are no answer
                raise httpx.ReadTimeout("the stream does not end")
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                return "".join(pieces)
            if data.startswith("{"):
                chunk = json.loads(data)
                if "error" in chunk:
                    return None
                pieces += [choice["text"] for choice in chunk["choices"]]
    if answer.status_code == 200:
        raise httpx.RemoteProtocolError("the stream broke off")
    return None
