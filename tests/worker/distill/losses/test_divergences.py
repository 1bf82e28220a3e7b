"""Every divergence against the plain formula under autograd, and against finite differences."""

import math
from dataclasses import replace
from typing import Literal, get_args

import pytest
import torch
from torch import Tensor

from app.contracts.distillation import DivergenceName, Objective, Phase
from worker.distill.losses.divergences import TokenObjective

N, V = 7, 23
DIVERGENCES: tuple[DivergenceName, ...] = get_args(DivergenceName)
OBJECTIVES = [
    TokenObjective(name, alpha=0.3, beta=0.7, temperature=temperature, ce_weight=ce_weight)
    for name in DIVERGENCES
    for temperature in (1.0, 2.5)
    for ce_weight in (0.0, 0.4)
]
OBJECTIVES += [
    TokenObjective(temperature=temperature, ce_weight=ce_weight, matches="rank")
    for temperature in (1.0, 2.5)
    for ce_weight in (0.0, 0.4)
]
MATCHING = [objective for objective in OBJECTIVES if objective.matches == "token"]


def plain_divergence(p: Tensor, q: Tensor, objective: TokenObjective) -> Tensor:
    """The textbook formula on probabilities."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(dim=-1)

    alpha, beta = objective.alpha, objective.beta
    if objective.matches == "rank":
        widest = max(p.shape[1], q.shape[1])
        p = torch.cat(
            [p.sort(descending=True).values, p.new_zeros(len(p), widest - p.shape[1])], dim=1
        )
        q = torch.cat(
            [q.sort(descending=True).values, q.new_zeros(len(q), widest - q.shape[1])], dim=1
        )
        return (p - q).abs().sum(dim=-1)
    match objective.divergence:
        case "forward_kl":
            return kl(p, q)
        case "reverse_kl":
            return kl(q, p)
        case "jsd":
            m = beta * p + (1 - beta) * q
            return beta * kl(p, m) + (1 - beta) * kl(q, m)
        case "skew_forward_kl":
            return kl(p, alpha * p + (1 - alpha) * q)
        case "skew_reverse_kl":
            return kl(q, (1 - alpha) * p + alpha * q)
        case "tvd":
            return (p - q).abs().sum(dim=-1) / 2
        case "hellinger":
            return ((p.sqrt() - q.sqrt()) ** 2).sum(dim=-1) / 2
        case "alpha_beta":
            s = alpha + beta
            terms = p**alpha * q**beta - alpha / s * p**s - beta / s * q**s
            return -terms.sum(dim=-1) / (alpha * beta)
        case "logit_mse":
            raise AssertionError("of logits, not of probabilities")


def plain_loss(
    student: Tensor, teacher: Tensor, targets: Tensor, objective: TokenObjective
) -> Tensor:
    """Of each row, from raw logits."""
    t, w = objective.temperature, objective.ce_weight
    ce = torch.nn.functional.cross_entropy(student, targets, reduction="none")
    if objective.divergence == "logit_mse":
        return (1 - w) * ((student - teacher) ** 2).mean(dim=-1) + w * ce
    divergence = plain_divergence((teacher / t).softmax(-1), (student / t).softmax(-1), objective)
    return (1 - w) * t**2 * divergence + w * ce


def random_logits(dtype: torch.dtype, *, teacher_tokens: int = V) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    student = 2 * torch.randn(N, V, generator=generator, dtype=torch.float64)
    teacher = 2 * torch.randn(N, teacher_tokens, generator=generator, dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype), torch.randint(V, (N,), generator=generator)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_loss_and_gradient_are_those_of_plain_autograd(
    objective: TokenObjective, dtype: torch.dtype, tolerance: float
) -> None:
    student, teacher, targets = random_logits(dtype)
    leaf = student.clone().requires_grad_()
    expected = plain_loss(leaf, teacher, targets, objective)
    expected.sum().backward()

    terms = objective.loss_and_gradient(student, teacher, targets)

    torch.testing.assert_close(terms.loss_N, expected.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(terms.gradient_NV, leaf.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_gradient_is_that_of_finite_differences(objective: TokenObjective) -> None:
    student, teacher, targets = random_logits(torch.float64)
    step = 1e-5
    numeric = torch.empty_like(student)
    for v in range(V):
        nudge = torch.zeros(V, dtype=torch.float64)
        nudge[v] = step
        above = objective.loss_and_gradient(student + nudge, teacher, targets).loss_N
        below = objective.loss_and_gradient(student - nudge, teacher, targets).loss_N
        numeric[:, v] = (above - below) / (2 * step)

    gradient = objective.loss_and_gradient(student, teacher, targets).gradient_NV

    torch.testing.assert_close(gradient, numeric, rtol=0, atol=1e-8)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_inputs_are_left_as_they_were(objective: TokenObjective) -> None:
    student, teacher, targets = random_logits(torch.float32)
    before = student.clone(), teacher.clone()
    objective.loss_and_gradient(student, teacher, targets)
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_a_student_equal_to_the_teacher_has_no_divergence_and_no_gradient(
    objective: TokenObjective,
) -> None:
    student, _, targets = random_logits(torch.float64)
    pure = replace(objective, ce_weight=0.0)
    terms = pure.loss_and_gradient(student, student, targets)
    torch.testing.assert_close(
        terms.loss_N, torch.zeros(N, dtype=torch.float64), rtol=0, atol=1e-14
    )
    torch.testing.assert_close(terms.gradient_NV, torch.zeros_like(student), rtol=0, atol=1e-14)


@pytest.mark.parametrize("peak", [500.0, 1e6, 1e15])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_float32_stays_finite_where_probabilities_underflow(
    objective: TokenObjective, peak: float
) -> None:
    peaked = torch.zeros(4, V)
    peaked[:, 0] = peak
    other = torch.zeros(4, V)
    other[:, 1] = peak
    other[2:] = peaked[2:] * torch.tensor([[1.0], [-1.0]])
    terms = objective.loss_and_gradient(peaked, other, torch.tensor([0, 1, 0, 1]))
    for found in (terms.loss_N, terms.gradient_NV, terms.kl_N, terms.ce_N):
        assert found.isfinite().all()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_float32_agrees_with_float64_where_probabilities_underflow(
    objective: TokenObjective,
) -> None:
    student, teacher, targets = random_logits(torch.float32)
    student, teacher = 60 * student, 60 * teacher
    exact = objective.loss_and_gradient(student.double(), teacher.double(), targets)
    terms = objective.loss_and_gradient(student, teacher, targets)
    torch.testing.assert_close(terms.loss_N.double(), exact.loss_N, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(terms.gradient_NV.double(), exact.gradient_NV, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("teacher_tokens", [V - 9, V + 9])
def test_ranks_are_compared_between_vocabularies_of_different_sizes(teacher_tokens: int) -> None:
    student, teacher, targets = random_logits(torch.float64, teacher_tokens=teacher_tokens)
    objective = TokenObjective(temperature=1.5, ce_weight=0.25, matches="rank")
    leaf = student.clone().requires_grad_()
    expected = plain_loss(leaf, teacher, targets, objective)
    expected.sum().backward()
    terms = objective.loss_and_gradient(student, teacher, targets)
    torch.testing.assert_close(terms.loss_N, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms.gradient_NV, leaf.grad, rtol=1e-12, atol=1e-12)


def test_ranks_do_not_depend_on_which_tokens_hold_them() -> None:
    student, _, targets = random_logits(torch.float64)
    shuffled = student[:, torch.randperm(V, generator=torch.Generator().manual_seed(1))]
    terms = TokenObjective(matches="rank").loss_and_gradient(student, shuffled, targets)
    torch.testing.assert_close(
        terms.loss_N, torch.zeros(N, dtype=torch.float64), rtol=0, atol=1e-14
    )
    assert not terms.kl_N.any()


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("skew_forward_kl", math.log(1 / 0.1)),
        ("skew_reverse_kl", math.log(1 / 0.1)),
        ("jsd", math.log(2)),
        ("tvd", 1.0),
        ("hellinger", 1.0),
    ],
)
def test_bounded_divergences_approach_their_bound_far_from_the_teacher(
    name: DivergenceName, bound: float
) -> None:
    student, teacher, targets = random_logits(torch.float64)
    loss_N = (
        TokenObjective(name, alpha=0.1)
        .loss_and_gradient(80 * student, 80 * teacher, targets)
        .loss_N
    )
    assert loss_N.max() <= bound + 1e-12
    assert loss_N.max() > 0.9 * bound


@pytest.mark.parametrize("objective", MATCHING, ids=str)
def test_kl_and_ce_are_reported_at_temperature_1_whatever_the_loss(
    objective: TokenObjective,
) -> None:
    student, teacher, targets = random_logits(torch.float64)
    terms = objective.loss_and_gradient(student, teacher, targets)
    kl_N = plain_divergence(teacher.softmax(-1), student.softmax(-1), TokenObjective("forward_kl"))
    ce_N = torch.nn.functional.cross_entropy(student, targets, reduction="none")
    torch.testing.assert_close(terms.kl_N, kl_N)
    torch.testing.assert_close(terms.ce_N, ce_N)


def test_second_phase_changes_the_divergence_and_keeps_temperature_and_ce_weight() -> None:
    objective = Objective(
        temperature=2.0,
        ce_weight=0.25,
        then=Phase(divergence="skew_forward_kl", alpha=0.2, beta=0.6),
    )
    assert TokenObjective.from_objective(objective) == TokenObjective(
        "forward_kl", alpha=0.1, beta=0.5, temperature=2.0, ce_weight=0.25
    )
    assert TokenObjective.from_objective(objective, objective.then) == TokenObjective(
        "skew_forward_kl", alpha=0.2, beta=0.6, temperature=2.0, ce_weight=0.25
    )


@pytest.mark.parametrize("name", DIVERGENCES)
def test_parameters_left_out_are_those_of_the_divergence(name: DivergenceName) -> None:
    alpha, beta = (0.2, 0.7) if name == "alpha_beta" else (0.1, 0.5)
    expected = TokenObjective(name, alpha=alpha, beta=beta)
    assert TokenObjective.from_objective(Objective(divergence=name)) == expected
    assert TokenObjective.from_objective(Objective(), Phase(divergence=name)) == expected
    chosen = Objective(divergence=name, alpha=0.4, beta=0.3)
    assert TokenObjective.from_objective(chosen) == TokenObjective(name, alpha=0.4, beta=0.3)


def test_another_vocabulary_is_matched_by_rank_in_both_phases() -> None:
    objective = Objective(teacher_signal="uld", then=Phase(divergence="jsd"))
    assert TokenObjective.from_objective(objective).matches == "rank"
    assert TokenObjective.from_objective(objective, objective.then).matches == "rank"


@pytest.mark.parametrize(
    ("end", "schedule", "expected"),
    [
        (None, "linear", [4.0, 4.0, 4.0, 4.0]),
        (1.0, "linear", [4.0, 3.25, 2.5, 1.0]),
        (1.0, "cosine", [4.0, 2.5 + 1.5 * math.sqrt(0.5), 2.5, 1.0]),
    ],
)
def test_temperature_follows_its_schedule_through_both_phases(
    end: float | None, schedule: Literal["linear", "cosine"], expected: list[float]
) -> None:
    objective = Objective(
        temperature=4.0,
        temperature_end=end,
        temperature_schedule=schedule,
        then=Phase(divergence="tvd"),
    )
    for phase in (None, objective.then):
        found = [
            TokenObjective.from_objective(objective, phase, s).temperature
            for s in (0.0, 0.25, 0.5, 1.0)
        ]
        assert found == pytest.approx(expected)
