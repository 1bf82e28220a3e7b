"""Our engine without HTTP: first token, decoding steps and the least time of one: `python -m bench.engine TASK.json`."""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import get_args

import torch
from torch import Tensor

from app.contracts.generation import (
    Delta,
    GenerateRequest,
    LoadedWeights,
    Message,
    Sampling,
    ServingOptions,
)
from app.contracts.messages import ArtifactRef
from bench.cases import Entry
from bench.floor import best_seconds, layers_of
from worker.cpu import linear_ops
from worker.serve.engine import TransformersEngine
from worker.serve.host.engine_factory import EngineLimits
from worker.serve.loading import LoadedModel, load_model

MAX_CONTEXT_TOKENS = 2048
NUM_STEPS = 48
NO_WEIGHTS = ArtifactRef(key="none", bytes=0)


def first_token_seconds(loaded: LoadedModel, prompts: list[str], max_tokens: int) -> list[float]:
    """From `add` to the first text, one request at a time."""
    engine = TransformersEngine(
        loaded.model, loaded.tokenizer, max_running=1, max_context_tokens=MAX_CONTEXT_TOKENS
    )
    seconds = []
    for number, prompt in enumerate(prompts):
        request = request_for(number, prompt, max_tokens)
        began = time.perf_counter()
        engine.add(request)
        while not any(isinstance(reply, Delta) and reply.text for reply in engine.step()):
            pass
        seconds.append(time.perf_counter() - began)
        engine.abort(request.id)
    return seconds[1:]  # the first warms up


def step_seconds(loaded: LoadedModel, num_rows: int, prompts: list[str]) -> float:
    """The median of a decoding step with so many rows, what becomes of its tokens included."""
    engine = TransformersEngine(
        loaded.model, loaded.tokenizer, max_running=num_rows, max_context_tokens=MAX_CONTEXT_TOKENS
    )
    for number in range(num_rows):
        engine.add(request_for(number, prompts[number % len(prompts)], NUM_STEPS))
    while engine.num_running < num_rows:
        engine.step()
    seconds = []
    while engine.num_running == num_rows:
        began = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - began)
    return median(seconds)


def request_for(number: int, prompt: str, max_tokens: int) -> GenerateRequest:
    return GenerateRequest(
        id=str(number),
        reply_to="bench",
        model="bench",
        weights=NO_WEIGHTS,
        messages=(Message(role="user", content=prompt),),
        sampling=Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
        deadline_at=time.time() + 600,
    )


def step_floor_seconds(loaded: LoadedModel, num_rows: int, dtype: torch.dtype) -> float:
    """The matrix products of one step for so many rows, each at the fastest way of multiplying in that float that we know."""
    tokens_N1 = torch.zeros(num_rows, 1, dtype=torch.long)
    shapes = Counter(layers_of(loaded.model, {"input_ids": tokens_N1, "use_cache": False}))
    weight_VH = loaded.model.get_output_embeddings().weight  # type: ignore[operator]
    assert isinstance(weight_VH, Tensor)
    shapes[num_rows, weight_VH.shape[1], weight_VH.shape[0]] += 1
    return sum(count * _forward_seconds(*shape, dtype) for shape, count in shapes.items())


def _forward_seconds(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> float:
    x_NI, weight_OI = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    ways: list[Callable[[], Tensor]] = [lambda: torch.nn.functional.linear(x_NI, weight_OI)]
    if linear_ops.HAS_ONEDNN:
        multiply = torch.ops.mkldnn._linear_pointwise.default
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, linear_ops.PACKED_FOR_ROWS)
        ways += [
            partial(multiply, x_NI, each, None, "none", [], "") for each in (weight_OI, packed)
        ]
    return min(best_seconds(way) for way in ways)


def measure(task: Entry) -> Entry:
    torch.set_num_threads(task["num_threads"])
    folder = Path(task["model_dir"])
    limits = EngineLimits(task["num_rows"], MAX_CONTEXT_TOKENS, "cpu", time.time, precision="auto")
    chosen = limits.weights_for(ServingOptions())  # as a worker does that is told nothing
    dtype = torch.bfloat16 if chosen == "bfloat16" else torch.float32
    with torch.no_grad():
        floor = step_floor_seconds(load_model(folder), task["num_rows"], dtype)
    found: Entry = {"step_floor_ms": 1000 * floor, "weights": chosen}
    for weights in get_args(LoadedWeights):
        loaded = load_model(folder, weights=weights, keeps_plain=False)  # as a worker has it
        first = first_token_seconds(loaded, task["prompts"], task["max_tokens"])
        found[weights] = {
            "first_token_ms_p50": 1000 * median(first),
            "step_ms": {
                n: 1000 * step_seconds(loaded, n, task["prompts"]) for n in (1, 8, task["num_rows"])
            },
            "bytes": loaded.num_bytes,
        }
    return {**found, **found[chosen]}


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    Path(task["answer"]).write_text(json.dumps(measure(task)))


if __name__ == "__main__":
    main()
