"""The serving engine, and the whole service beside `vllm serve` where vLLM is installed."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import httpx

from app.contracts.control import ServedModel
from app.contracts.generation import Done, Failure, GenerateRequest, Sampling
from app.contracts.messages import ArtifactRef
from app.local.embedded_servers import free_port
from app.parent_death import tethered
from bench.gpu.memory import synchronize
from bench.gpu.models import CONTEXT_TOKENS, Json
from bench.gpu.sizes import Sizes
from bench.load import Target
from bench.servers import Server, serving, stop, wait_until_up
from worker.serve.engine import Engine
from worker.serve.host.engine_factory import EngineLimits, LoadProgress, engine_for

PEER = "vllm"
PROMPT = "The still is warm and the spirit runs clear into the jar."
REQUEST_SECONDS = 300.0
FOLDER = ArtifactRef(key="random", bytes=1)


def measure_engine(folder: Path, sizes: Sizes, device: str) -> Json:
    """Returns the tokens per second of the engine that a serve worker would choose."""
    served = ServedModel(model="random", weights=FOLDER)
    limits = EngineLimits(max(sizes.callers), CONTEXT_TOKENS, device, time.time)
    engine, _ = engine_for(served, lambda ref: folder, limits, LoadProgress(FOLDER.bytes))
    rates = rates_of_engine(engine, sizes, device)
    return {"engine": type(engine).__name__, "tokens_per_second": rates}


def rates_of_engine(engine: Engine, sizes: Sizes, device: str) -> dict[str, float]:
    """Returns the tokens per second at each number of requests, each after a warm-up."""
    rates = {}
    for num_requests in sizes.callers:
        generate(engine, num_requests, sizes.new_tokens)  # records graphs of these shapes
        synchronize(device)
        begun = time.perf_counter()
        num_tokens = generate(engine, num_requests, sizes.new_tokens)
        synchronize(device)
        rates[str(num_requests)] = round(num_tokens / (time.perf_counter() - begun), 1)
    return rates


def generate(engine: Engine, num_requests: int, new_tokens: int) -> int:
    """Runs requests that all begin together, and returns the number of their tokens.

    Raises RuntimeError if a request fails.
    """
    for number in range(num_requests):
        engine.add(
            GenerateRequest(
                id=str(number),
                reply_to="",
                model="random",
                weights=FOLDER,
                text=PROMPT,
                sampling=Sampling(max_tokens=new_tokens, temperature=0.0, ignore_eos=True),
                deadline_at=time.time() + REQUEST_SECONDS,
            )
        )
    num_tokens = num_done = 0
    while num_done < num_requests:
        for reply in engine.step():
            if isinstance(reply, Failure):
                raise RuntimeError(f"a request failed: {reply}")
            if isinstance(reply, Done):
                num_done += 1
                num_tokens += reply.completion_tokens
    return num_tokens


def compare_services(work: Path, folder: Path, sizes: Sizes) -> Json:
    """Returns the tokens per second of our service and of `vllm serve`, both over HTTP.

    Without vLLM nothing is started, and the result has only `not_compared`.
    """
    if find_spec(PEER) is None:
        return {"not_compared": ["vLLM is not installed"]}
    rates: dict[str, dict[str, float]] = {}
    with serving(Server("ours"), folder, work, os.cpu_count() or 1) as target:
        rates["ours"] = rates_of(target, sizes)
    with vllm_serve(folder, work) as target:
        rates[PEER] = rates_of(target, sizes)
    ratios = {n: round(rates["ours"][n] / rates[PEER][n], 3) for n in rates["ours"]}
    return {"tokens_per_second": rates, "ratio": ratios}


@contextmanager
def vllm_serve(folder: Path, work: Path) -> Iterator[Target]:
    """Runs `vllm serve` with its defaults until the block ends. Raises ChildFailed."""
    port, log_path = free_port(), work / "vllm.log"
    program = str(Path(sys.executable).with_name("vllm"))
    command = [program, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", str(CONTEXT_TOKENS)]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            tethered(command),
            stdout=log,
            stderr=log,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
            start_new_session=True,
        )
    try:
        wait_until_up(process, f"http://127.0.0.1:{port}", log_path)
        yield Target(f"http://127.0.0.1:{port}", str(folder))
    finally:
        stop(process)


def rates_of(target: Target, sizes: Sizes) -> dict[str, float]:
    """Returns the tokens per second at each number of callers, after a warm-up."""
    asyncio.run(rate_of(target, sizes.callers[0], sizes.new_tokens))
    return {
        str(num_callers): asyncio.run(rate_of(target, num_callers, sizes.new_tokens))
        for num_callers in sizes.callers
    }


async def rate_of(target: Target, num_callers: int, new_tokens: int) -> float:
    """Returns the tokens per second of callers that begin together, with one request each."""
    body = {
        "model": target.model,
        "prompt": PROMPT,
        "max_tokens": new_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
    }
    async with httpx.AsyncClient(
        limits=httpx.Limits(max_connections=None),
        headers={"Authorization": f"Bearer {target.key}"},
        timeout=REQUEST_SECONDS,
        trust_env=False,
    ) as client:
        begun = time.perf_counter()
        responses = await asyncio.gather(
            *(client.post(f"{target.url}/v1/completions", json=body) for _ in range(num_callers))
        )
        seconds = time.perf_counter() - begun
    num_tokens = 0
    for response in responses:
        response.raise_for_status()
        num_tokens += response.json()["usage"]["completion_tokens"]
    return round(num_tokens / seconds, 1)
