"""What HTTP adds to a first token: the same prompts over HTTP and in this process, a few of each by turns.

Two medians of thirty milliseconds, taken minutes apart, differ by more than what is looked for. So a few requests in a row
over HTTP, as one caller sends them, are followed by the same in process; the figure is the median of what HTTP took longer.
"""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import httpx
import torch

from app.contracts.generation import Delta, ServingOptions
from bench.cases import Entry
from bench.engine import MAX_CONTEXT_TOKENS, request_for
from bench.load import REQUEST_SECONDS, Target, ask
from worker.serve.engine import TransformersEngine
from worker.serve.host.engine_factory import EngineLimits
from worker.serve.loading import load_model

IN_A_ROW = 6


def first_tokens(
    target: Target, model_dir: Path, prompts: Sequence[str], *, max_tokens: int, num_threads: int
) -> Entry:
    """Medians in ms over the prompts: over HTTP, in process, and of the differences of both at one prompt."""
    torch.set_num_threads(num_threads)
    limits = EngineLimits(1, MAX_CONTEXT_TOKENS, "cpu", time.time, precision="auto")
    weights = limits.weights_for(ServingOptions())  # as a worker does that is told nothing
    loaded = load_model(model_dir, weights=weights, keeps_plain=False)
    engine = TransformersEngine(
        loaded.model, loaded.tokenizer, max_running=1, max_context_tokens=MAX_CONTEXT_TOKENS
    )
    pairs = asyncio.run(_pairs(target, engine, prompts, max_tokens))
    return {
        "http_ms_p50": 1000 * median(http for http, _ in pairs),
        "in_process_ms_p50": 1000 * median(inside for _, inside in pairs),
        "overhead_ms_p50": 1000 * median(http - inside for http, inside in pairs),
        "num_pairs": len(pairs),
    }


async def _pairs(
    target: Target, engine: TransformersEngine, prompts: Sequence[str], max_tokens: int
) -> list[tuple[float, float]]:
    headers = {"Authorization": f"Bearer {target.key}"}
    pairs: list[tuple[float, float]] = []
    async with httpx.AsyncClient(
        headers=headers, timeout=REQUEST_SECONDS, trust_env=False
    ) as client:
        await ask(client, target, prompts[0], max_tokens)  # both warm up
        _first_seconds(engine, prompts[0], max_tokens)
        for begin in range(0, len(prompts), IN_A_ROW):
            row = prompts[begin : begin + IN_A_ROW]
            http = [(await ask(client, target, prompt, max_tokens)).first_seconds for prompt in row]
            inside = [_first_seconds(engine, prompt, max_tokens) for prompt in row]
            pairs += zip(http, inside, strict=True)
    return pairs


def _first_seconds(engine: TransformersEngine, prompt: str, max_tokens: int) -> float:
    """From `add` to the first text; the answer is then written to its end, as it is over HTTP."""
    first: float | None = None
    began = time.perf_counter()
    engine.add(request_for(0, prompt, max_tokens))
    while engine.has_work():
        for reply in engine.step():
            if first is None and isinstance(reply, Delta) and reply.text:
                first = time.perf_counter() - began
    assert first is not None
    return first
