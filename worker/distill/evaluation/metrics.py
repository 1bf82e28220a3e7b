"""Metrics of a model: from its measurement on the held-out rows, and from its answers."""

from collections.abc import Collection, Sequence
from typing import Any

from worker.distill.evaluation.bootstrap import Figure, exponential, mean
from worker.distill.evaluation.held_out import HeldOut, rouge_l
from worker.distill.evaluation.label_metrics import Labels

Entry = dict[str, Any]  # Any: open-ended JSON
Figures = dict[str, Figure]
ANSWER_METRICS = frozenset({"rouge_l", "exact_match", "accuracy", "macro_f1"})


def held_out_figures(
    held_out: HeldOut, metrics: Collection[str], groups: Sequence[int] | None = None
) -> Figures:
    """Returns means over tokens. Loss is always included, and KL if there is a teacher.

    Without a teacher there is the token accuracy instead of the agreement. `groups` has the number
    of each row's group, by shared questions.
    """
    targets_R = held_out.targets_R.numpy()
    loss, kl, cross_entropy, agreement = (
        mean(sums_R, targets_R).grouped(groups) for sums_R in held_out.sums_R4.numpy().T.copy()
    )
    figures = {"loss": loss}
    if held_out.has_teacher:
        figures["kl"] = kl
    if "perplexity" in metrics:
        figures["perplexity"] = exponential(cross_entropy)
    if "agreement" in metrics and held_out.has_teacher:
        figures["agreement"] = agreement
    if held_out.has_accuracy:
        figures["token_accuracy"] = agreement
    return figures


def answer_figures(
    answers: Sequence[str],
    teachers: Sequence[str] | None,
    references: Sequence[str | None],
    labels: Labels | None,
    metrics: Collection[str],
    groups: Sequence[int] | None = None,
) -> Figures:
    """Returns means over answers, compared with the teacher's answers and with the references.

    Comparisons with references cover the rows that have one. Their names end in `_reference`.
    Labels are those of the references, so for accuracy and macro-F1 it is the comparison with the
    teacher that has a suffix, `_teacher`.

    `groups` has the number of each answer's group, by shared questions.
    """
    if groups is None:
        groups = range(len(answers))
    referred = [
        (ours, text, group)
        for ours, text, group in zip(answers, references, groups, strict=True)
        if text is not None
    ]
    sides: list[tuple[str, str, Sequence[str], Sequence[str], Sequence[int]]] = []
    if teachers is not None:
        sides.append(("", "_teacher", answers, teachers, groups))
    if referred:
        with_text, texts, their_groups = zip(*referred, strict=True)
        sides.append(("_reference", "", with_text, texts, their_groups))
    figures: Figures = {}
    for suffix, label_suffix, ours, theirs, of_side in sides:
        found: Figures = {}
        if "rouge_l" in metrics:
            found[f"rouge_l{suffix}"] = mean(rouge_l(ours, theirs))
        if "exact_match" in metrics:
            is_same = [
                one.strip() == other.strip() for one, other in zip(ours, theirs, strict=True)
            ]
            found[f"exact_match{suffix}"] = mean(is_same)
        if labels is not None:
            accuracy, macro_f1 = labels.figures(ours, theirs)
            found |= {f"accuracy{label_suffix}": accuracy, f"macro_f1{label_suffix}": macro_f1}
        figures |= {name: figure.grouped(of_side) for name, figure in found.items()}
    return figures


def with_intervals(figures: Figures) -> Entry:
    """Returns the figures as JSON. `intervals` holds the 95% interval of each."""
    intervals = {name: list(figure.interval()) for name, figure in figures.items()}
    return {**{name: figure.value for name, figure in figures.items()}, "intervals": intervals}


def difference(figures: Figures, others: Figures) -> Entry:
    """Returns the figures minus those of another model, on the rows of both.

    The models differ in a figure if its interval does not contain 0.
    """
    return with_intervals(
        {name: of.minus(others[name]) for name, of in figures.items() if name in others}
    )
