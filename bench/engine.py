"""Our engine without HTTP: first token and the least time of a decoding step: `python -m bench.engine TASK.json`."""

import json
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from app.contracts import ArtifactRef, Delta, GenerateRequest, Message, Sampling
from bench.cases import Entry
from bench.floor import best_seconds, layers_of
from worker import gemm
from worker.serve.engine import TransformersEngine
from worker.serve.loading import LoadedModel, load_model

MAX_CONTEXT_TOKENS = 2048
NO_WEIGHTS = ArtifactRef(key="none", bytes=0)


def first_token_seconds(loaded: LoadedModel, prompts: list[str], max_tokens: int) -> list[float]:
    """From `add` to the first text, one request at a time."""
    engine = TransformersEngine(
        loaded.model, loaded.tokenizer, max_running=1, max_context_tokens=MAX_CONTEXT_TOKENS
    )
    seconds = []
    for number, prompt in enumerate(prompts):
        request = GenerateRequest(
            id=str(number),
            reply_to="bench",
            model="bench",
            weights=NO_WEIGHTS,
            messages=(Message(role="user", content=prompt),),
            sampling=Sampling(max_tokens=max_tokens, temperature=0.0),
            deadline_at=time.time() + 600,
        )
        began = time.perf_counter()
        engine.add(request)
        while not any(isinstance(reply, Delta) and reply.text for reply in engine.step()):
            pass
        seconds.append(time.perf_counter() - began)
        engine.abort(request.id)
    return seconds[1:]  # the first warms up


def step_floor_seconds(loaded: LoadedModel, num_rows: int) -> float:
    """The matrix products of one step for so many rows, each at the fastest way of multiplying that we know."""
    tokens_N1 = torch.zeros(num_rows, 1, dtype=torch.long)
    shapes = Counter(layers_of(loaded.model, {"input_ids": tokens_N1, "use_cache": False}))
    weight_VH = loaded.model.get_output_embeddings().weight  # type: ignore[operator]
    assert isinstance(weight_VH, Tensor)
    shapes[num_rows, weight_VH.shape[1], weight_VH.shape[0]] += 1
    return sum(count * _forward_seconds(*shape) for shape, count in shapes.items())


def _forward_seconds(rows: int, inputs: int, outputs: int) -> float:
    x_NI, weight_OI = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    ways = [
        lambda: torch.nn.functional.linear(x_NI, weight_OI),
        lambda: gemm.product(x_NI, weight_OI),
    ]
    if gemm.HAS_ONEDNN:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, gemm.PACKED_FOR_ROWS)
        ways.append(lambda: gemm.product(x_NI, packed))
    return min(best_seconds(way) for way in ways)


def measure(task: Entry) -> Entry:
    torch.set_num_threads(task["num_threads"])
    loaded = load_model(Path(task["model_dir"]))
    with torch.no_grad():
        floor = step_floor_seconds(loaded, task["num_rows"])
    first = first_token_seconds(loaded, task["prompts"], task["max_tokens"])
    return {"first_token_ms_p50": 1000 * median(first), "step_floor_ms": 1000 * floor}


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    Path(task["answer"]).write_text(json.dumps(measure(task)))


if __name__ == "__main__":
    main()
