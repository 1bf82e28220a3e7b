from typing import Any

import pytest

from app.contracts.distillation import Evaluation, Gate
from worker.distill.evaluation.model_selection import choose, passes

LADDER: list[dict[str, Any]] = [  # Any: open-ended JSON
    {"num_parameters": 900, "kl": 0.5, "agreement": 0.8},
    {"num_parameters": 300, "kl": 1.5, "agreement": 0.5},
    {"num_parameters": 600, "kl": 0.5, "agreement": 0.7},
]


@pytest.mark.parametrize(
    ("gate", "is_passed"),
    [
        (Gate(metric="agreement", at_least=0.8), True),
        (Gate(metric="agreement", at_least=0.81), False),
        (Gate(metric="kl", at_most=0.5), True),
        (Gate(metric="kl", at_most=0.4), False),
        (Gate(metric="accuracy", at_least=0.0), False),  # it was not measured
        (None, True),
    ],
)
def test_a_gate_is_passed_at_its_bound(gate: Gate | None, is_passed: bool) -> None:
    assert passes(gate, LADDER[0]) is is_passed


@pytest.mark.parametrize(
    ("evaluation", "number"),
    [
        ({}, 1),
        ({"gate": {"metric": "agreement", "at_least": 0.6}}, 2),
        ({"gate": {"metric": "agreement", "at_least": 0.9}}, None),
        ({"choose": "best"}, 2),  # KL is equal, so the smaller
        ({"choose": "best", "gate": {"metric": "agreement", "at_least": 0.1}}, 0),
        ({"choose": "best", "gate": {"metric": "kl", "at_most": 1.0}}, 2),
    ],
)
def test_the_smallest_passing_or_the_best_is_chosen(
    evaluation: dict[str, Any], number: int | None
) -> None:
    assert choose(LADDER, Evaluation.model_validate(evaluation)) == number


def test_without_kl_the_best_is_the_one_with_the_least_loss() -> None:
    ladder = [{"num_parameters": 1, "loss": 2.0}, {"num_parameters": 2, "loss": 1.0}]
    assert choose(ladder, Evaluation(choose="best")) == 1


def test_a_student_without_an_evaluation_is_not_the_best() -> None:
    unmeasured = {"num_parameters": 100, "missing": [{"part": "evaluation"}]}
    assert choose([unmeasured, *LADDER], Evaluation(choose="best")) == 3
    gate = Gate(metric="kl", at_most=9.0)
    assert choose([unmeasured, *LADDER], Evaluation(gate=gate)) == 2
    assert choose([unmeasured], Evaluation(choose="best")) == 0
