"""Losses between two vocabularies, against plain autograd over full logits.

N rows, H hidden width, V the student's vocabulary, U the teacher's.
"""

from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config

from tests.tiny import tiny_tokenizer
from worker.distill.data.answer_cache import AnswerFile
from worker.distill.data.dataset import Reader, Rows
from worker.distill.data.rows import Example
from worker.distill.losses.divergences import TokenObjective
from worker.distill.losses.lm_head import Head, TeacherRows
from worker.distill.losses.uld import Aligned, align_rows, teacher_loss
from worker.errors import TokenizerMismatch

N, H, V, U = 7, 8, 30, 20
MASK_N = torch.tensor([True, False, True, True, False, False, True])
RANKS = TokenObjective(matches="rank", ce_weight=0.5)


def rows_of(student: list[Example], teacher: list[Example]) -> Rows:
    return Rows(student[:1], student[1:], teacher, [], AnswerFile(None))


def reader(kind: str) -> Reader:
    return Reader(GPT2Config(), tiny_tokenizer(kind))


def read(kind: str, text: str) -> Example:
    tokenizer = tiny_tokenizer(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    return Example((0, *ids), ((1, 1 + len(ids)),))


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_ranks_are_compared_at_aligned_rows_and_the_text_at_all(
    ce_weight: float, temperature: float
) -> None:
    hidden_NH, weight_VH = normal(N, H, seed=0), normal(V, H, seed=1)
    teacher_MH, teacher_UH = normal(4, H, seed=2), normal(U, H, seed=3)
    targets_N = torch.arange(N)
    objective = replace(RANKS, ce_weight=ce_weight, temperature=temperature)

    plain_NH, plain_VH = hidden_NH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
    z_NV = plain_NH @ plain_VH.T
    q = (z_NV[MASK_N] / temperature).softmax(-1).sort(descending=True).values
    p = (teacher_MH @ teacher_UH.T / temperature).softmax(-1).sort(descending=True).values
    ranks = (q - torch.nn.functional.pad(p, (0, V - U))).abs().sum()
    text = torch.nn.functional.cross_entropy(z_NV, targets_N, reduction="sum")
    expected = ((1 - ce_weight) * temperature**2 * ranks + ce_weight * text) / 10.0
    expected.backward()

    fused_NH, fused_VH = hidden_NH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
    loss, stats = teacher_loss(
        fused_NH,
        Head(fused_VH),
        targets_N,
        TeacherRows(Head(teacher_UH), hidden_NH=teacher_MH, mask_N=MASK_N),
        objective,
        denominator=10.0,
    )
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(fused_NH.grad, plain_NH.grad)
    torch.testing.assert_close(fused_VH.grad, plain_VH.grad)
    assert stats.loss_sum == pytest.approx(10 * float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize(
    "mask_N", [torch.ones(N).bool(), torch.zeros(N).bool()], ids=["all", "none"]
)
def test_rows_may_be_aligned_all_or_none(mask_N: torch.Tensor) -> None:
    hidden_NH = normal(N, H, seed=0).requires_grad_()
    teacher = TeacherRows(
        Head(normal(U, H, seed=3)), hidden_NH=normal(int(mask_N.sum()), H, seed=2), mask_N=mask_N
    )
    head = Head(normal(V, H, seed=1))
    loss, _ = teacher_loss(hidden_NH, head, torch.arange(N), teacher, RANKS, denominator=1.0)
    loss.backward()
    assert hidden_NH.grad is not None
    assert bool((hidden_NH.grad.abs().sum(dim=-1) > 0).all())


def test_a_student_that_says_the_same_under_other_numbers_has_no_loss() -> None:
    hidden_NH, weight_VH = normal(N, H, seed=0), normal(V, H, seed=1)
    permuted = Head(weight_VH[torch.randperm(V, generator=torch.Generator().manual_seed(5))])
    mask_N = torch.ones(N, dtype=torch.bool)
    loss, _ = teacher_loss(
        hidden_NH,
        permuted,
        torch.arange(N),
        TeacherRows(Head(weight_VH), hidden_NH=hidden_NH, mask_N=mask_N),
        replace(RANKS, ce_weight=0.0),
        denominator=1.0,
    )
    assert float(loss) == pytest.approx(0.0, abs=1e-5)


def test_the_teachers_rows_are_cut_to_the_targets_that_the_student_has_too() -> None:
    texts = ["The still is warm", "into the jar"]
    students, teachers = [read("chat", t) for t in texts], [read("unigram", t) for t in texts]
    aligned = align_rows(
        rows_of(students, teachers), reader("chat"), reader("unigram"), has_one_tokenizer=False
    )
    assert [example.num_targets for example in aligned.examples] == [4, 3]
    assert [int(mask.sum()) for mask in aligned.masks] == [4, 3]
    for example, whole in zip(aligned.examples, teachers, strict=True):
        assert example.token_ids == whole.token_ids
        assert set(example.target_positions) <= set(whole.target_positions)
    assert [len(mask) for mask in aligned.masks] == [student.num_targets for student in students]
    assert 0.0 < aligned.share < 1.0


def test_the_share_is_of_all_targets() -> None:
    aligned = Aligned([], [torch.tensor([True, False, False]), torch.tensor([True])])
    assert aligned.share == 0.5


def test_one_tokenizer_aligns_every_target() -> None:
    examples = [read("chat", "The still is warm"), read("chat", "into the jar")]
    aligned = align_rows(
        rows_of(examples, examples), reader("chat"), reader("chat"), has_one_tokenizer=True
    )
    assert aligned.share == 1.0
    assert aligned.examples == examples


def test_texts_without_a_common_token_are_refused() -> None:
    students, teachers = [read("chat", t) for t in "ab"], [read("unigram", t) for t in "cd"]
    with pytest.raises(TokenizerMismatch, match="text"):
        align_rows(
            rows_of(students, teachers), reader("chat"), reader("unigram"), has_one_tokenizer=False
        )
