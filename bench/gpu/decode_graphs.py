"""Decode steps of our engine with and without CUDA graphs, on the same model."""

from pathlib import Path

from bench.gpu.engines import rates_of_engine
from bench.gpu.models import CONTEXT_TOKENS, Json
from bench.gpu.peak_speed import peak_bandwidth
from bench.gpu.sizes import Sizes
from worker.serve.decoding.cursor_batch import Steps
from worker.serve.engine import TransformersEngine
from worker.serve.loading import load_model


def compare_graphs(folder: Path, sizes: Sizes, device: str, card: str) -> Json:
    """Returns the tokens per second with and without graphs, and their ratios.

    `bandwidth_share` is that of the weights of one request: bytes per second that decode steps
    read, relative to the memory of the card. On a CPU, steps with fixed addresses stand for graphs.
    """
    loaded = load_model(folder, device=device)
    rates: dict[str, dict[str, float]] = {}
    kinds: dict[str, Steps] = {"plain": "plain", "graphs": "auto" if device == "cuda" else "static"}
    for name, steps in kinds.items():
        engine = TransformersEngine(
            loaded.model,
            loaded.tokenizer,
            max_running=max(sizes.callers),
            max_context_tokens=CONTEXT_TOKENS,
            steps=steps,
        )
        rates[name] = rates_of_engine(engine, sizes, device)
    ratios = {n: round(rates["graphs"][n] / rates["plain"][n], 3) for n in rates["plain"]}
    report: Json = {"tokens_per_second": rates, "ratio": ratios}
    if engine.graphs is not None:
        report |= {
            "num_failed": int(engine.graphs.is_off),
            "num_graphs": len(engine.graphs),
            "graph_bytes": engine.graphs.num_bytes,
        }
    bandwidth = peak_bandwidth(card)
    if bandwidth is not None and "1" in ratios:
        read = loaded.num_bytes * rates["graphs"]["1"]
        report["bandwidth_share"] = round(read / bandwidth, 3)
    return report
