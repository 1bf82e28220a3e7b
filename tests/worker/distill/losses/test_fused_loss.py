"""The fused loss against two plain heads, whole logits and autograd."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.worker.distill.losses.test_divergences import plain_loss as row_losses
from worker.distill.losses import lm_head
from worker.distill.losses.divergences import TokenObjective
from worker.distill.losses.fused_loss import RowStats, fused_distillation_loss
from worker.distill.losses.lm_head import Head, TeacherRows, expected_rows, head_of
from worker.errors import VocabMismatch

N, H, H_TEACHER, V = 11, 8, 12, 37
OBJECTIVES = [
    TokenObjective("forward_kl"),
    TokenObjective("forward_kl", ce_weight=0.3),
    TokenObjective("reverse_kl", temperature=2.0),
    TokenObjective("jsd", beta=0.3, temperature=1.5, ce_weight=0.5),
    TokenObjective("skew_forward_kl", alpha=0.2),
    TokenObjective("skew_reverse_kl", alpha=0.3, temperature=2.0),
    TokenObjective("tvd", ce_weight=0.2),
    TokenObjective("hellinger", temperature=2.0, ce_weight=0.2),
    TokenObjective("alpha_beta", alpha=0.2, beta=0.7, temperature=1.5),
    TokenObjective("logit_mse", temperature=2.0, ce_weight=0.4),
]
RANKS = TokenObjective(matches="rank", temperature=1.5, ce_weight=0.3)


class Case:
    """Random rows and heads; every tensor of the student is a leaf."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float64,
        *,
        num_rows: int = N,
        num_tokens: int = V,
        teacher_tokens: int | None = None,
        bias: bool = True,
        is_head_frozen: bool = False,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(5)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden = draw(num_rows, H).requires_grad_()
        self.weight = draw(num_tokens, H).requires_grad_(not is_head_frozen)
        self.bias = draw(num_tokens).requires_grad_(not is_head_frozen) if bias else None
        self.head = Head(self.weight, self.bias, scale=scale, softcap=softcap)
        wide = teacher_tokens or num_tokens
        self.teacher = TeacherRows(
            Head(draw(wide, H_TEACHER) / 2, draw(wide)), draw(num_rows, H_TEACHER)
        )
        self.targets = torch.randint(num_tokens, (num_rows,), generator=generator)

    def leaves(self) -> list[Tensor]:
        return [
            t for t in (self.hidden, self.weight, self.bias) if t is not None and t.requires_grad
        ]

    def gradients(self) -> list[Tensor]:
        gradients = [t.grad for t in self.leaves() if t.grad is not None]
        for leaf in self.leaves():
            leaf.grad = None
        return gradients


def plain_logits(hidden: Tensor, head: Head) -> Tensor:
    logits = hidden @ head.weight_VH.T + (0 if head.bias_V is None else head.bias_V)
    logits = head.scale * logits
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def plain_loss(case: Case, objective: TokenObjective, denominator: float) -> Tensor:
    assert case.teacher.hidden_NH is not None
    student = plain_logits(case.hidden, case.head)
    teacher = plain_logits(case.teacher.hidden_NH, case.teacher.head)
    return row_losses(student, teacher, case.targets, objective).sum() / denominator


def fused(
    case: Case, objective: TokenObjective, chunk_rows: int | None = None
) -> tuple[Tensor, RowStats]:
    return fused_distillation_loss(
        case.hidden,
        case.head,
        case.targets,
        case.teacher,
        objective,
        denominator=17.0,
        chunk_rows=chunk_rows,
    )


def assert_equals_plain(case: Case, objective: TokenObjective, tolerance: float) -> None:
    expected = plain_loss(case, objective, 17.0)
    (3.0 * expected).backward()
    expected_gradients = case.gradients()
    loss, _ = fused(case, objective, chunk_rows=4)
    (3.0 * loss).backward()
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(case.gradients(), expected_gradients, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("objective", [*OBJECTIVES, RANKS], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("is_head_frozen", [False, True])
def test_loss_and_gradients_are_those_of_the_plain_computation(
    objective: TokenObjective, dtype: torch.dtype, tolerance: float, is_head_frozen: bool
) -> None:
    assert_equals_plain(Case(dtype, is_head_frozen=is_head_frozen), objective, tolerance)


def test_head_without_bias() -> None:
    assert_equals_plain(Case(bias=False), OBJECTIVES[0], 1e-12)


@pytest.mark.parametrize("objective", [*OBJECTIVES, RANKS], ids=str)
def test_scale_and_softcap_of_the_head_are_in_loss_and_gradient(objective: TokenObjective) -> None:
    assert_equals_plain(Case(scale=0.5, softcap=2.0), objective, 1e-12)


def test_frozen_head_gets_no_gradient() -> None:
    case = Case(is_head_frozen=True)
    fused(case, OBJECTIVES[0])[0].backward()
    assert case.hidden.grad is not None
    assert case.weight.grad is None


def test_only_the_head_is_trained_when_the_hidden_states_need_no_gradient() -> None:
    case = Case()
    case.hidden = case.hidden.detach()
    plain_loss(case, OBJECTIVES[2], 17.0).backward()
    expected = case.gradients()
    fused(case, OBJECTIVES[2])[0].backward()
    torch.testing.assert_close(case.gradients(), expected)


@pytest.mark.parametrize("objective", [*OBJECTIVES, RANKS], ids=str)
@pytest.mark.parametrize("chunk_rows", [1, 3, 11, 100])
def test_chunks_change_nothing(chunk_rows: int, objective: TokenObjective) -> None:
    case = Case()
    whole, whole_stats = fused(case, objective, chunk_rows=N)
    whole.backward()
    whole_gradients = case.gradients()
    chunked, stats = fused(case, objective, chunk_rows=chunk_rows)
    chunked.backward()
    torch.testing.assert_close(chunked, whole, rtol=1e-13, atol=0)
    torch.testing.assert_close(case.gradients(), whole_gradients, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(stats.sums, whole_stats.sums, rtol=1e-13, atol=0)


@pytest.mark.parametrize("rows_a_group", [1, 2, 3])
def test_groups_change_nothing(rows_a_group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    whole, _ = fused(case, OBJECTIVES[1])
    whole.backward()
    whole_gradients = case.gradients()
    monkeypatch.setattr(lm_head, "CPU_GROUP_BYTES", rows_a_group * V * 8)
    grouped, _ = fused(case, OBJECTIVES[1])
    grouped.backward()
    torch.testing.assert_close(grouped, whole, rtol=1e-13, atol=0)
    torch.testing.assert_close(case.gradients(), whole_gradients, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("num_rows", "most", "sizes"), [(130, 128, [65, 65]), (5, 2, [1, 2, 2]), (0, 4, [])]
)
def test_rows_are_split_into_chunks_of_nearly_equal_size(
    num_rows: int, most: int, sizes: list[int]
) -> None:
    chunks = lm_head.split_rows(num_rows, Case().head, most)
    assert [rows.stop - rows.start for rows in chunks] == sizes


def test_micro_batches_over_one_denominator_add_up_to_the_whole_batch() -> None:
    case = Case()
    whole, whole_stats = fused(case, OBJECTIVES[1])
    whole.backward()
    whole_gradients = case.gradients()
    stats = RowStats.zero()
    for rows in (slice(0, 2), slice(2, N)):
        assert case.teacher.hidden_NH is not None
        loss, part = fused_distillation_loss(
            case.hidden[rows],
            case.head,
            case.targets[rows],
            TeacherRows(case.teacher.head, case.teacher.hidden_NH[rows]),
            OBJECTIVES[1],
            denominator=17.0,
        )
        loss.backward()
        stats += part
    torch.testing.assert_close(case.gradients(), whole_gradients)
    torch.testing.assert_close(stats.sums, whole_stats.sums)
    assert stats.num_rows == N


@pytest.mark.parametrize("is_head_frozen", [False, True])
def test_no_rows_give_zero_loss_and_zero_gradients(is_head_frozen: bool) -> None:
    case = Case(num_rows=0, is_head_frozen=is_head_frozen)
    loss, stats = fused(case, OBJECTIVES[3])
    loss.backward()
    assert loss.item() == 0
    assert (stats.num_rows, stats.kl_sum, stats.num_agreeing) == (0, 0.0, 0)
    assert all(not gradient.any() for gradient in case.gradients())


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_statistics_are_at_temperature_1_whatever_the_objective(objective: TokenObjective) -> None:
    case = Case()
    assert case.teacher.hidden_NH is not None
    student = plain_logits(case.hidden, case.head)
    teacher = plain_logits(case.teacher.hidden_NH, case.teacher.head)
    loss, stats = fused(case, objective)
    assert stats.loss_sum == pytest.approx(17.0 * loss.item())
    assert stats.kl_sum == pytest.approx(plain_loss(case, OBJECTIVES[0], 1.0).item())
    assert stats.ce_sum == pytest.approx(
        torch.nn.functional.cross_entropy(student, case.targets).item() * N
    )
    assert stats.num_agreeing == int((student.argmax(-1) == teacher.argmax(-1)).sum())


def test_a_student_that_is_the_teacher_agrees_everywhere() -> None:
    case = Case()
    case.teacher = TeacherRows(case.head, case.hidden.detach())
    _, stats = fused(case, OBJECTIVES[0])
    assert stats.num_agreeing == N
    assert stats.kl_sum == pytest.approx(0, abs=1e-12)


def test_without_grad_the_statistics_are_the_same_and_the_gradient_products_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case()
    _, trained = fused(case, OBJECTIVES[1])
    monkeypatch.delattr("worker.distill.losses.fused_loss.matmul")
    with torch.no_grad():
        loss, stats = fused(case, OBJECTIVES[1])
    assert torch.equal(stats.sums, trained.sums)
    assert not loss.requires_grad


@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_expected_head_rows_replace_the_teachers_logits_exactly(
    ce_weight: float, bias: bool, dtype: torch.dtype, tolerance: float
) -> None:
    case = Case(dtype, bias=bias, is_head_frozen=True, scale=0.5)
    teacher_hidden = torch.randn(N, H, generator=torch.Generator().manual_seed(9), dtype=dtype)
    case.teacher = TeacherRows(case.head, teacher_hidden)
    objective = TokenObjective("forward_kl", ce_weight=ce_weight)
    full, full_stats = fused(case, objective, chunk_rows=4)
    full.backward()
    full_gradients = case.gradients()

    expected = expected_rows(teacher_hidden, case.head, chunk_rows=3)
    case.teacher = TeacherRows(case.head, expected=expected)
    head_row = expected.head_NH.clone()
    loss, stats = fused(case, objective, chunk_rows=4)
    loss.backward()

    torch.testing.assert_close(loss, full, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(case.gradients(), full_gradients, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(stats.sums, full_stats.sums, rtol=tolerance, atol=tolerance)
    assert torch.equal(expected.head_NH, head_row)


@pytest.mark.parametrize(
    ("objective", "is_head_frozen"),
    [
        (TokenObjective("jsd"), True),
        (TokenObjective(matches="rank"), True),
        (TokenObjective("forward_kl", temperature=2.0), True),
        (TokenObjective(), False),
    ],
)
def test_expected_rows_are_refused_where_they_would_be_wrong(
    objective: TokenObjective, is_head_frozen: bool
) -> None:
    case = Case(is_head_frozen=is_head_frozen)
    case.teacher = TeacherRows(case.head, expected=expected_rows(case.hidden.detach(), case.head))
    with pytest.raises(AssertionError, match="forward KL at T = 1"):
        fused(case, objective)


def test_heads_of_different_vocabularies_are_refused() -> None:
    case = Case()
    case.teacher = Case(num_tokens=V + 1).teacher
    with pytest.raises(VocabMismatch, match="shares a tokenizer"):
        fused(case, OBJECTIVES[0])


@pytest.mark.parametrize("teacher_tokens", [V - 9, V + 9])
def test_a_teacher_of_another_vocabulary_is_matched_by_rank(teacher_tokens: int) -> None:
    case = Case(teacher_tokens=teacher_tokens)
    assert_equals_plain(case, RANKS, 1e-12)
    _, stats = fused(case, RANKS)
    assert (stats.kl_sum, stats.num_agreeing) == (0.0, 0)
    assert stats.ce_sum > 0


def test_bfloat16_heads_accumulate_in_float32() -> None:
    case = Case(torch.bfloat16)
    loss, stats = fused(case, OBJECTIVES[0], chunk_rows=4)
    loss.backward()
    exact = Case()
    plain = plain_loss(exact, OBJECTIVES[0], 17.0)
    plain.backward()
    assert loss.dtype == torch.float32
    assert [g.dtype for g in case.gradients()] == [torch.bfloat16] * 3
    assert loss.item() == pytest.approx(plain.item(), rel=0.03)
    assert stats.num_rows == N


def test_padding_rows_of_a_head_get_no_probability(tiny_llama_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float64)
    num_tokens = model.config.vocab_size
    model.resize_token_embeddings(num_tokens + 8, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[num_tokens:] = 50.0
    case = Case(num_rows=4)
    hidden = torch.randn(4, model.config.hidden_size, dtype=torch.float64)
    head = head_of(model, num_tokens)
    teacher = TeacherRows(Head(torch.randn(num_tokens, 3).double()), torch.randn(4, 3).double())
    loss, _ = fused_distillation_loss(
        hidden.requires_grad_(), head, case.targets, teacher, OBJECTIVES[0], denominator=1.0
    )
    loss.backward()
    plain = Head(model.get_output_embeddings().weight[:num_tokens].detach())
    without_padding, _ = fused_distillation_loss(
        hidden, plain, case.targets, teacher, OBJECTIVES[0], denominator=1.0
    )
    assert head.num_tokens == num_tokens
    assert loss.item() == pytest.approx(without_padding.item())
    gradient = model.get_output_embeddings().weight.grad
    assert gradient[:num_tokens].abs().sum() > 0
    assert not gradient[num_tokens:].any()


def test_a_tied_embedding_gets_both_gradients(tiny_llama_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float64)
    ids = torch.arange(3, 20)[None]
    targets = torch.arange(4, 21)
    model(input_ids=ids, labels=None).logits[0].log_softmax(-1)[
        range(17), targets
    ].sum().neg().backward()
    embedding = model.get_input_embeddings().weight
    expected, embedding.grad = embedding.grad, None
    head = head_of(model)
    teacher = TeacherRows(head_of(model), torch.zeros(17, 64, dtype=torch.float64))
    hidden = model.base_model(input_ids=ids).last_hidden_state[0]
    ce_only = TokenObjective(ce_weight=1.0)
    loss, _ = fused_distillation_loss(hidden, head, targets, teacher, ce_only, denominator=1.0)
    loss.backward()
    torch.testing.assert_close(embedding.grad, expected)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk_rows", [None, 4])
def test_without_a_teacher_the_loss_is_cross_entropy(
    chunk_rows: int | None, softcap: float | None
) -> None:
    case = Case(scale=0.7, softcap=softcap)
    logits = plain_logits(case.hidden, case.head)
    torch.nn.functional.cross_entropy(logits, case.targets).backward()
    plain, expected = case.gradients(), torch.nn.functional.cross_entropy(logits, case.targets)
    loss, stats = fused_distillation_loss(
        case.hidden,
        case.head,
        case.targets,
        None,
        TokenObjective(),
        denominator=N,
        chunk_rows=chunk_rows,
    )
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(case.gradients(), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    assert stats.kl_sum == 0.0
    assert stats.num_agreeing == 0
    assert stats.ce_sum == pytest.approx(expected.item() * N)
