"""Serving and training on the same cores: what each keeps of its undisturbed speed.

    .venv/bin/python bench/serve.py --beside-training [--json FILE]

One service with one serve worker and one train worker, as `stillhouse up` starts them. The loads are measured without a
job; then a job trains, and its steps per second are measured while nobody asks, and with each load. Every load is
repeated until it has run for some seconds, so that both sides meet often.
"""

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import httpx

from bench.cases import Entry
from bench.children import ChildFailed
from bench.load import Answer, Load, Target, drive

T = TypeVar("T")
CALLERS = (1, 8, 32)
LEAST_SECONDS = 15.0  # of each load
ALONE_SECONDS = 25.0  # of training while nobody asks
START_SECONDS = 300.0
NUM_ROWS = 600
ANSWER = (
    2 * "It is a thing that people have used for a very long time, and there are many kinds of it. "
)


def measure_beside_training(
    target: Target, prompts: Sequence[str], *, max_tokens: int, summary: Callable[[Load], Entry]
) -> Entry:
    """Loads without and with a training job, and the job's steps per second without and with each load."""
    headers = {"Authorization": f"Bearer {target.key}"}
    with httpx.Client(base_url=target.url, headers=headers, timeout=60, trust_env=False) as client:
        drive(target, prompts, num_callers=2, requests_each=1, max_tokens=max_tokens)  # warms up
        alone = {str(n): summary(_load(target, prompts, n, max_tokens)) for n in CALLERS}
        job_id = _start_training(client, target.model, prompts)
        try:
            _, steps_alone = _steps_per_second(client, job_id, partial(time.sleep, ALONE_SECONDS))
            beside: Entry = {}
            for num_callers in CALLERS:
                run = partial(_load, target, prompts, num_callers, max_tokens)
                load, rate = _steps_per_second(client, job_id, run)
                beside[str(num_callers)] = summary(load) | {"steps_per_second": round(rate, 3)}
            _, steps_after = _steps_per_second(client, job_id, partial(time.sleep, ALONE_SECONDS))
        finally:
            client.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
    steps = (steps_alone + steps_after) / 2
    return {
        "alone": alone,
        "beside": beside,
        "steps_per_second_alone": [round(steps_alone, 3), round(steps_after, 3)],
        "ratios": {n: _ratios(alone[n], beside[n], steps) for n in alone},
    }


def _ratios(alone: Entry, beside: Entry, steps_per_second: float) -> Entry:
    return {
        "tokens_per_second": round(beside["tokens_per_second"] / alone["tokens_per_second"], 3),
        "first_token_ms_p50": round(beside["first_token_ms_p50"] / alone["first_token_ms_p50"], 2),
        "steps_per_second": round(beside["steps_per_second"] / steps_per_second, 3),
    }


def _load(target: Target, prompts: Sequence[str], num_callers: int, max_tokens: int) -> Load:
    """Repeats a load until it has taken long enough, without a pause between."""
    answers: list[Answer] = []
    seconds = 0.0
    while seconds < LEAST_SECONDS:
        load = drive(
            target, prompts, num_callers=num_callers, requests_each=4, max_tokens=max_tokens
        )
        answers += load.answers
        seconds += load.seconds
    return Load(tuple(answers), seconds)


def _start_training(client: httpx.Client, model: str, prompts: Sequence[str]) -> str:
    """Submits a job that trains for longer than the bench takes, and waits for its first steps."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{prompt} ({i})"},
                {"role": "assistant", "content": ANSWER},
            ]
        }
        for i, prompt in enumerate(prompts[i % len(prompts)] for i in range(NUM_ROWS))
    ]
    content = "\n".join(json.dumps(row) for row in rows).encode()
    uploaded = _call(
        client, "POST", "/v1/files", data={"purpose": "fine-tune"}, files={"file": content}
    )
    distillation = {
        "teacher": model,
        "student": {"num_layers": 15, "fit_rows": 0},
        "hyperparameters": {"n_epochs": 1000, "eval_steps": 100_000, "checkpoint_steps": 100_000},
    }
    body = {
        "model": model,
        "training_file": uploaded["id"],
        "method": {"type": "distillation", "distillation": distillation},
    }
    job_id = str(_call(client, "POST", "/v1/fine_tuning/jobs", json=body)["id"])
    deadline = time.monotonic() + START_SECONDS
    while _step(client, job_id) < 10:
        if time.monotonic() > deadline:
            raise ChildFailed(
                f"the job did not begin to train: {_call(client, 'GET', _path(job_id))}"
            )
        time.sleep(0.5)
    return job_id


def _steps_per_second(client: httpx.Client, job_id: str, work: Callable[[], T]) -> tuple[T, float]:
    """What the work returns, and the job's steps per second between the reports before and after it."""
    first_step, first_at = _next_report(client, job_id)
    result = work()
    last_step, last_at = _next_report(client, job_id)
    return result, (last_step - first_step) / (last_at - first_at)


def _next_report(client: httpx.Client, job_id: str) -> tuple[int, float]:
    """The job's step at the moment when it changes; a job reports it once a second."""
    before = _step(client, job_id)
    while (step := _step(client, job_id)) == before:
        time.sleep(0.02)
    return step, time.monotonic()


def _step(client: httpx.Client, job_id: str) -> int:
    job = _call(client, "GET", _path(job_id))
    if job["status"] not in ("validating_files", "queued", "running"):
        raise ChildFailed(f"the job that was to train is {job['status']}: {job['error']}")
    return int((job["progress"] or {}).get("step") or 0)


def _path(job_id: str) -> str:
    return f"/v1/fine_tuning/jobs/{job_id}"


def _call(
    client: httpx.Client, method: str, path: str, **options: Any
) -> Entry:  # Any: httpx's own options
    response = client.request(method, path, **options)
    if response.is_error:
        raise ChildFailed(f"{method} {path}: {response.status_code} {response.text[:300]}")
    return dict(response.json())


def table(entry: Entry) -> list[tuple[str, ...]]:
    """Rows: callers, tokens/s alone and beside, first token p50 alone and beside, steps/s beside, with the ratios."""
    return [
        (
            n,
            f"{alone['tokens_per_second']:.0f}",
            f"{beside['tokens_per_second']:.0f} ({ratios['tokens_per_second']:.0%})",
            f"{alone['first_token_ms_p50']:.0f}",
            f"{beside['first_token_ms_p50']:.0f} ({ratios['first_token_ms_p50']:.1f}×)",
            f"{beside['steps_per_second']:.2f} ({ratios['steps_per_second']:.0%})",
        )
        for n, alone in entry["alone"].items()
        for beside, ratios in [(entry["beside"][n], entry["ratios"][n])]
    ]
