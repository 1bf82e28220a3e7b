"""The figures of a model's result: from its held-out measurement, and from its answers beside others'."""

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
    """Returns token means; loss and KL whatever the metrics are. Without a teacher there is neither KL nor agreement.

    `groups` has the number of each row's group, by shared questions.
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
    return figures


def answer_figures(
    answers: Sequence[str],
    teachers: Sequence[str] | None,
    references: Sequence[str | None],
    labels: Labels | None,
    metrics: Collection[str],
    groups: Sequence[int] | None = None,
) -> Figures:
    """Means over answers, compared with the teacher's and (named so) with the references of the rows that have one.

    `groups` has the number of each answer's group, by shared questions.
    Labels are those of the references, so accuracy and macro_f1 go by them, and by the teacher under a name of its own.
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
    """As JSON: each figure a number, and `intervals` with the 95% interval of each."""
    intervals = {name: list(figure.interval()) for name, figure in figures.items()}
    return {**{name: figure.value for name, figure in figures.items()}, "intervals": intervals}


def difference(figures: Figures, others: Figures) -> Entry:
    """The figures less another model's, on the rows they share: intervals that hold no 0 are a difference."""
    return with_intervals(
        {name: of.minus(others[name]) for name, of in figures.items() if name in others}
    )
