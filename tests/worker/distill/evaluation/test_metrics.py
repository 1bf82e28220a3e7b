from dataclasses import replace

import pytest
import torch

from worker.distill.evaluation.held_out import HeldOut
from worker.distill.evaluation.label_metrics import find_labels
from worker.distill.evaluation.metrics import (
    answer_figures,
    difference,
    held_out_figures,
    with_intervals,
)

HELD_OUT = HeldOut(
    sums_R4=torch.tensor([[2.0, 1.0, 4.0, 1.0], [1.0, 0.5, 2.0, 2.0]], dtype=torch.float64),
    targets_R=torch.tensor([3, 2]),
)


def test_held_out_figures_are_means_over_tokens() -> None:
    figures = held_out_figures(HELD_OUT, {"perplexity", "agreement"})
    values = {name: figure.value for name, figure in figures.items()}
    assert values == pytest.approx(
        {
            "loss": HELD_OUT.loss,
            "kl": HELD_OUT.kl,
            "perplexity": HELD_OUT.perplexity,
            "agreement": HELD_OUT.agreement,
        }
    )
    assert values["loss"] == pytest.approx(3 / 5)
    assert set(held_out_figures(HELD_OUT, set())) == {"loss", "kl"}


def test_without_a_teachers_distribution_there_is_no_distance_to_it() -> None:
    alone = replace(HELD_OUT, has_teacher=False)
    assert set(held_out_figures(alone, {"perplexity", "agreement"})) == {"loss", "perplexity"}


def test_answers_stand_beside_the_teachers_and_the_references_that_there_are() -> None:
    answers, teachers = ["yes", "no", "the still", "yes"], ["yes", "no", "the jar", "maybe"]
    references = ["yes", "yes", None, "yes"]
    figures = answer_figures(answers, teachers, references, None, {"rouge_l", "exact_match"})
    assert {name: figure.value for name, figure in figures.items()} == pytest.approx(
        {
            "rouge_l": (1 + 1 + 0.5 + 0) / 4,
            "exact_match": 0.5,
            "rouge_l_reference": 2 / 3,
            "exact_match_reference": 2 / 3,
        }
    )


def test_labels_give_accuracy_by_the_references_and_by_the_teacher() -> None:
    references = ["yes", "yes", "no", "no"]
    labels = find_labels(references, [1] * 4)
    figures = answer_figures(
        ["Yes.", "no", "no", "no"], ["yes", "no", "no", "?"], references, labels, set()
    )
    values = {name: figure.value for name, figure in figures.items()}
    assert values["accuracy"] == 0.75
    assert values["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert values["accuracy_teacher"] == 0.75
    assert values["macro_f1_teacher"] == pytest.approx((1 + 4 / 5) / 2)


def test_a_difference_has_the_figures_that_both_have() -> None:
    ours = held_out_figures(HELD_OUT, {"agreement"})
    theirs = held_out_figures(HELD_OUT, {"perplexity"})
    assert difference(ours, theirs) == {
        "loss": 0.0,
        "kl": 0.0,
        "intervals": {"loss": [0.0, 0.0], "kl": [0.0, 0.0]},
    }
    assert with_intervals({}) == {"intervals": {}}
