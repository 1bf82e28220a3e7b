"""What a card must reach. A figure that is missing is not judged."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from bench.gpu.models import Json

LEAST_MFU = {"live": 0.35, "cached": 0.30}  # at the largest batch
MOST_WAITS = 1.0  # per step
MOST_OVER_ESTIMATE = 1.1  # peak memory, relative to its estimate
MOST_ESTIMATE = 1.6  # estimate, relative to the peak: a larger one refuses jobs that would fit
MOST_LOSS_MS, MOST_LOSS_BYTES = 1.1, 1.1  # relative to Liger's chunked loss
LOSS_TOLERANCE = 5e-3  # relative, between implementations
LEAST_VS_TRL = 1.0
LEAST_VS_VLLM = 0.9
LEAST_SCALING = 1.7  # of two cards
# Decode steps with CUDA graphs: docs/performance/gpu.md has the arithmetic.
LEAST_VS_PLAIN = {"1": 2.0}  # tokens per second, relative to plain steps, by number of requests
LEAST_VS_PLAIN_AT_MORE = 1.2
LEAST_BANDWIDTH = 0.2  # of the card's memory, by the weights that one request reads


@dataclass(frozen=True)
class Check:
    """A figure and its bound. `is_least` says that the bound is a minimum."""

    name: str
    value: float
    bound: float
    is_least: bool = False

    @property
    def has_passed(self) -> bool:
        """Whether the figure is finite and within its bound."""
        if not math.isfinite(self.value):
            return False
        return self.value >= self.bound if self.is_least else self.value <= self.bound

    def __str__(self) -> str:
        sign = ">=" if self.is_least else "<="
        verdict = "ok    " if self.has_passed else "FAILED"
        return f"{verdict} {self.name}: {self.value:.3g} (bound: {sign} {self.bound:.3g})"


def checks_of(report: Json) -> list[Check]:
    """Returns the checks of all figures in a report."""
    return [
        *_of_steps(report.get("steps") or []),
        *_of_losses(report.get("losses") or {}),
        *_of_whole_run(report.get("whole_run") or {}),
        *_of_graphs(report.get("graphs") or {}),
        *_of_peers(report),
    ]


def _of_steps(steps: list[Json]) -> Iterator[Check]:
    largest = max((step["batch_tokens"] for step in steps), default=0)
    for step in steps:
        name = f"step, {step['teacher']} teacher, {step['batch_tokens']} tokens"
        if step["batch_tokens"] == largest:
            yield Check(f"{name}: MFU", step["mfu"], LEAST_MFU[step["teacher"]], is_least=True)
        yield Check(f"{name}: waits", step["waits_per_step"], MOST_WAITS)
        ratio = step["peak_bytes"] / step["estimated_bytes"]
        yield Check(f"{name}: peak memory / estimate", ratio, MOST_OVER_ESTIMATE)
        if step["teacher"] == "live":
            yield Check(f"{name}: estimate / peak memory", 1 / ratio, MOST_ESTIMATE)


def _of_losses(losses: Json) -> Iterator[Check]:
    entries = losses.get("entries", {})
    if not entries:
        return
    ours = entries["fused"]
    for name, entry in entries.items():
        for key in ("loss", "gradient_norm"):
            error = abs(ours[key] / entry[key] - 1)
            yield Check(f"fused loss: {key}, relative to {name}'s", error, LOSS_TOLERANCE)
    if "liger" in entries:
        liger = entries["liger"]
        yield Check("fused loss: time / Liger's", ours["ms"] / liger["ms"], MOST_LOSS_MS)
        memory = ours["peak_bytes"] / liger["peak_bytes"]
        yield Check("fused loss: memory / Liger's", memory, MOST_LOSS_BYTES)


def _of_whole_run(run: Json) -> Iterator[Check]:
    if run:
        missing = run["num_steps"] - run["last_step"]
        yield Check("resumed run: steps that are missing", missing, 0)
        yield Check("resumed run: KL of the student", run["kl_student"], math.inf)


def _of_graphs(graphs: Json) -> Iterator[Check]:
    if "num_failed" in graphs:
        yield Check("graphs: recordings that failed", graphs["num_failed"], 0)
    for number, ratio in graphs.get("ratio", {}).items():
        name = f"engine at {number} requests: tokens per second / those without graphs"
        bound = LEAST_VS_PLAIN.get(number, LEAST_VS_PLAIN_AT_MORE)
        yield Check(name, ratio, bound, is_least=True)
    if "bandwidth_share" in graphs:
        share = graphs["bandwidth_share"]
        yield Check("engine at 1 request: bandwidth", share, LEAST_BANDWIDTH, is_least=True)


def _of_peers(report: Json) -> Iterator[Check]:
    trl = report.get("trl") or {}
    for step in report.get("steps") or []:
        is_same = step["teacher"] == "live" and step["batch_tokens"] == trl.get("batch_tokens")
        if is_same:
            ratio = step["tokens_per_second"] / trl["tokens_per_second"]
            yield Check("step: tokens per second / TRL's", ratio, LEAST_VS_TRL, is_least=True)
    for number, ratio in ((report.get("services") or {}).get("ratio") or {}).items():
        name = f"service at {number} callers: tokens per second / vLLM's"
        yield Check(name, ratio, LEAST_VS_VLLM, is_least=True)
    if "ratio" in (report.get("scaling") or {}):
        ratio = report["scaling"]["ratio"]
        yield Check(
            "two cards: tokens per second / one card's", ratio, LEAST_SCALING, is_least=True
        )
