"""Selects a student of a ladder: applies the gate, and chooses among the students that pass."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from app.contracts.distillation import Evaluation, Gate

Figures = Mapping[str, Any]  # Any: a student's public entry, see worker.distill.evaluation.report
LESS_IS_BETTER = ("kl", "loss", "perplexity")


def passes(gate: Gate | None, figures: Figures) -> bool:
    """Returns whether a student passes the gate. One without the gate's metric does not."""
    if gate is None:
        return True
    value = figures.get(gate.metric)
    if value is None:
        return False
    if gate.at_least is not None:
        return bool(value >= gate.at_least)
    return bool(value <= gate.at_most)


def choose(ladder: Sequence[Figures], evaluation: Evaluation) -> int | None:
    """Returns the index of the student to register, or None if no student passes.

    The best student is the best by the gate's metric. Without a gate it is the best by KL, or by
    loss if there is no KL. Among equals the smallest is chosen. A student whose evaluation failed
    is chosen as the best only if no other passes.
    """
    passing = [i for i, figures in enumerate(ladder) if passes(evaluation.gate, figures)]
    has_kl = all("kl" in figures for figures in ladder if "loss" in figures)
    metric = evaluation.gate.metric if evaluation.gate is not None else "kl" if has_kl else "loss"
    sign = 1 if metric in LESS_IS_BETTER else -1

    def rank(i: int) -> tuple[float, float]:
        """Returns a sort key for a student. The lowest is chosen."""
        size = ladder[i]["num_parameters"]
        value = sign * ladder[i][metric] if metric in ladder[i] else math.inf
        return (size, 0.0) if evaluation.choose == "smallest_passing" else (value, size)

    return min(passing, key=rank, default=None)
