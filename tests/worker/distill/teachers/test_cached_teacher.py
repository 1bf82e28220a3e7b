"""Cached teacher rows equal live ones bit for bit, whoever computed them and in whatever batch."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from worker.distill.data.batching import collate
from worker.distill.data.rows import Example
from worker.distill.losses.divergences import TokenObjective
from worker.distill.losses.fused_loss import fused_distillation_loss
from worker.distill.losses.lm_head import Head, TeacherRows, head_of
from worker.distill.teachers.cached_teacher import CachedTeacher, LiveTeacher, cached_teacher
from worker.distill.teachers.row_cache import cache_bytes
from worker.distill.teachers.row_format import Keeps

LENGTHS = (9, 30, 17, 17, 24, 2)
KEEPS: tuple[Keeps, ...] = ("hidden", "expected", "top")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model(tiny_llama_dir: Path) -> Any:  # Any: transformers is untyped here
    return AutoModelForCausalLM.from_pretrained(tiny_llama_dir).eval()


@pytest.fixture
def rows() -> list[Example]:
    """Rows of several lengths; each has all but its first third as targets."""
    generator = torch.Generator().manual_seed(1)
    return [
        Example(
            tuple(torch.randint(3, 380, (n,), generator=generator).tolist()), ((max(1, n // 3), n),)
        )
        for n in LENGTHS
    ]


class Opener:
    """Opens teachers over one cache folder and counts how often the live one was loaded."""

    def __init__(self, model: Any, rows: list[Example], folder: Path) -> None:
        self.model, self.data_rows, self.folder = model, rows, folder
        self.num_loads = 0

    def load(self) -> LiveTeacher:
        self.num_loads += 1
        return LiveTeacher(self.model)

    def __call__(
        self,
        keeps: Keeps = "hidden",
        budget_bytes: int = 2**30,
        identity: str = "t",
        *,
        may_keep_top: bool = False,
    ) -> CachedTeacher:
        return cached_teacher(
            self.load,
            head_of(self.model),
            folder=self.folder,
            budget_bytes=budget_bytes,
            identity=identity,
            examples=self.data_rows,
            keeps=keeps,
            may_keep_top=may_keep_top,
        )


@pytest.fixture
def opener(model: Any, rows: list[Example], tmp_path: Path) -> Opener:
    return Opener(model, rows, tmp_path)


def tensors(teacher_rows: TeacherRows) -> list[Tensor]:
    if (top := teacher_rows.top) is not None:
        return [top.ids_NK, top.log_p_NK, top.log_rest_N]
    if teacher_rows.expected is None:
        assert teacher_rows.hidden_NH is not None
        return [teacher_rows.hidden_NH]
    return [
        teacher_rows.expected.head_NH,
        teacher_rows.expected.neg_entropy_N,
        teacher_rows.expected.top_N,
    ]


def assert_same_bits(one: TeacherRows, other: TeacherRows) -> None:
    assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


@pytest.mark.parametrize("folder", ["tiny_llama_dir", "tiny_gpt2_dir"])
def test_live_rows_are_the_input_of_the_models_head(
    folder: str, rows: list[Example], request: pytest.FixtureRequest
) -> None:
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(folder))
    batch = collate(rows, [0, 1, 5, 4])
    with torch.no_grad():
        logits = model.eval()(
            input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT
        ).logits[batch.keep_BT]
    hidden = torch.cat(LiveTeacher(model).hidden([rows[i] for i in batch.indices]))
    torch.testing.assert_close(hidden @ head_of(model).weight_VH.T, logits, rtol=1e-4, atol=1e-4)


def test_bits_of_a_row_do_not_depend_on_its_batch(model: Any, rows: list[Example]) -> None:
    live = LiveTeacher(model)
    together = live.hidden([rows[i] for i in (3, 1, 0, 4)])
    for hidden_TH, i in zip(together, (3, 1, 0, 4), strict=True):
        assert torch.equal(live.hidden([rows[i]])[0], hidden_TH)


def test_bits_of_a_row_do_not_depend_on_how_many_are_computed_at_once(
    model: Any, rows: list[Example]
) -> None:
    alone = LiveTeacher(model).hidden(rows)
    torch.set_num_threads(2)
    together = LiveTeacher(model).hidden(rows)
    assert torch.get_num_threads() == 2  # the teacher's threads have a number of their own
    for one_TH, other_TH in zip(alone, together, strict=True):
        assert torch.equal(one_TH, other_TH)


@pytest.mark.parametrize("keeps", KEEPS)
def test_cached_rows_are_the_live_ones_bit_for_bit(keeps: Keeps, opener: Opener) -> None:
    indices = [2, 0, 5, 1]
    teacher = opener(keeps)
    live = teacher.rows(indices)
    assert_same_bits(teacher.rows(indices), live)
    teacher.close()
    again = opener(keeps)
    assert_same_bits(again.rows(indices), live)
    assert opener.num_loads == 1
    again.close()


@pytest.mark.parametrize("keeps", KEEPS)
def test_a_half_filled_or_damaged_cache_changes_no_bit(keeps: Keeps, opener: Opener) -> None:
    with_fresh_cache = Opener(opener.model, opener.data_rows, opener.folder / "fresh")
    other = with_fresh_cache(keeps)
    indices = [4, 3, 1]
    expected, with_row_3 = other.rows(indices), other.rows([3])
    other.close()

    teacher = opener(keeps)
    teacher.rows([0, 3])
    teacher.rows([4, 2])
    teacher.close()
    path = next(path for path in opener.folder.glob("*/rows.bin") if "fresh" not in path.parts)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) * 9 // 10] ^= 1  # in row 4
    path.write_bytes(damaged)

    teacher = opener(keeps)
    assert_same_bits(teacher.rows([3]), with_row_3)
    assert not teacher.is_loaded
    assert_same_bits(teacher.rows(indices), expected)
    assert teacher.num_computed == 2  # rows 1 and 4
    teacher.close()


def test_rows_come_in_the_order_of_the_mask(opener: Opener) -> None:
    teacher = opener()
    indices = [1, 5, 0]
    batch = collate(opener.data_rows, indices)
    teacher.rows([0])  # one of the three comes from the cache
    with torch.no_grad():
        hidden_BTH = opener.model.base_model(
            input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT
        )
    hidden_NH = hidden_BTH.last_hidden_state[batch.keep_BT]
    torch.testing.assert_close(teacher.rows(indices).hidden_NH, hidden_NH, rtol=1e-4, atol=1e-4)
    teacher.close()


def test_the_live_teacher_is_let_go_when_every_row_is_stored(opener: Opener) -> None:
    teacher = opener()
    teacher.rows([0, 1, 2])
    assert teacher.is_loaded
    teacher.rows([3, 4, 5])
    assert not teacher.is_loaded
    teacher.rows([0, 3])
    assert opener.num_loads == 1
    teacher.close()


@pytest.mark.parametrize("keeps", KEEPS[:2])
def test_a_tight_budget_keeps_bfloat16_and_the_live_rows_are_rounded_alike(
    keeps: Keeps, opener: Opener
) -> None:
    num_positions = sum(row.num_targets for row in opener.data_rows)
    sizes = [num_positions * (64 * 2 + (8 if keeps == "expected" else 0))] + [0] * 5
    teacher = opener(keeps, budget_bytes=cache_bytes(sizes))
    indices = [1, 2]
    first = teacher.rows(indices)
    assert tensors(first)[0].dtype == torch.bfloat16
    assert "bfloat16" in str(teacher.notes)
    assert_same_bits(teacher.rows(indices), first)
    assert sum(path.stat().st_size for path in opener.folder.glob("*/*")) == cache_bytes(sizes)
    teacher.close()


def test_the_likeliest_tokens_are_kept_in_their_order_with_the_rest_as_one(opener: Opener) -> None:
    teacher, whole = opener("top"), opener()
    hidden_NH = whole.rows([1, 2]).hidden_NH
    assert hidden_NH is not None
    log_p_NV = (hidden_NH @ head_of(opener.model).weight_VH.detach().T).log_softmax(-1)
    log_p_NK, ids_NK = log_p_NV.topk(64)
    top = teacher.rows([1, 2]).top
    assert top is not None
    assert torch.equal(top.ids_NK, ids_NK)
    torch.testing.assert_close(top.log_p_NK, log_p_NK)
    torch.testing.assert_close(
        top.log_rest_N, (1 - log_p_NK.exp().sum(-1)).log(), rtol=1e-2, atol=1e-3
    )
    teacher.close()
    whole.close()


@pytest.mark.parametrize("keeps", KEEPS[:2])
def test_where_bfloat16_does_not_fit_the_likeliest_tokens_may(
    keeps: Keeps, opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.distill.teachers.cached_teacher.TOP_K", 8)
    num_positions = sum(row.num_targets for row in opener.data_rows)
    sizes = [num_positions * (8 * 8 + 4)] + [0] * 5
    teacher = opener(keeps, budget_bytes=cache_bytes(sizes), may_keep_top=True)
    first = teacher.rows([1, 2])
    assert first.top is not None
    assert first.top.ids_NK.shape[1] == 8
    assert "8 most likely" in str(teacher.notes)
    assert_same_bits(teacher.rows([1, 2]), first)
    assert sum(path.stat().st_size for path in opener.folder.glob("*/*")) == cache_bytes(sizes)
    teacher.close()
    refused = opener(keeps, budget_bytes=cache_bytes(sizes))
    assert refused.rows([1]).hidden_NH is not None
    refused.close()
    tighter = opener(keeps, budget_bytes=cache_bytes(sizes) - 1, may_keep_top=True)
    assert tighter.rows([1]).hidden_NH is not None
    tighter.close()


def test_the_finest_format_that_fits_needs_no_note(opener: Opener) -> None:
    teacher = opener(may_keep_top=True)
    assert teacher.rows([0]).hidden_NH is not None
    assert teacher.notes == []
    teacher.close()


def test_rows_without_targets_have_a_place_in_the_cache(opener: Opener) -> None:
    opener.data_rows = [
        opener.data_rows[0],
        replace(opener.data_rows[1], spans=()),
        opener.data_rows[2],
    ]
    for keeps in KEEPS:
        teacher = opener(keeps)
        first = teacher.rows([1, 0, 2])
        assert (
            len(tensors(first)[0])
            == opener.data_rows[0].num_targets + opener.data_rows[2].num_targets
        )
        assert_same_bits(teacher.rows([1, 0, 2]), first)
        assert len(tensors(teacher.rows([1]))[0]) == 0
        assert not teacher.is_loaded
        teacher.close()


def test_without_room_the_teacher_runs_every_time_and_nothing_is_written(opener: Opener) -> None:
    teacher = opener("expected", budget_bytes=100)
    indices = [1, 2]
    rows = teacher.rows(indices)
    assert rows.expected is None
    assert "every step" in str(teacher.notes)
    hidden = torch.cat(LiveTeacher(opener.model).hidden([opener.data_rows[i] for i in indices]))
    assert torch.equal(tensors(rows)[0], hidden)
    assert teacher.is_loaded
    assert list(opener.folder.iterdir()) == []
    teacher.close()


def test_a_full_disk_changes_no_bit(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    indices = [1, 2]
    teacher = opener("expected")
    expected = teacher.rows(indices)
    teacher.close()
    monkeypatch.setattr("worker.distill.teachers.cached_teacher.open_cache", lambda *_, **__: None)
    without_disk = opener("expected")
    assert_same_bits(without_disk.rows(indices), expected)
    without_disk.close()


def change_identity(opener: Opener) -> CachedTeacher:
    return opener(identity="other")


def change_keeps(opener: Opener) -> CachedTeacher:
    return opener("expected")


def change_token(opener: Opener) -> CachedTeacher:
    first, *others = opener.data_rows
    opener.data_rows = [replace(first, token_ids=(9, *first.token_ids[1:])), *others]
    return opener()


def change_targets(opener: Opener) -> CachedTeacher:
    first, *others = opener.data_rows
    opener.data_rows = [
        replace(first, spans=((first.spans[0][0] - 1, first.spans[0][1] - 1),)),
        *others,
    ]
    return opener()


def change_source(opener: Opener) -> CachedTeacher:
    first, *others = opener.data_rows
    opener.data_rows = [replace(first, source_ids=(7,)), *others]
    return opener()


def change_threads(opener: Opener) -> CachedTeacher:
    torch.set_num_threads(2)
    return opener()


@pytest.mark.parametrize(
    "change",
    [change_identity, change_keeps, change_token, change_targets, change_source, change_threads],
    ids=lambda c: c.__name__,
)
def test_whatever_determines_the_rows_names_another_cache(
    change: Callable[[Opener], CachedTeacher], opener: Opener
) -> None:
    opener().close()
    opener().close()
    assert len(list(opener.folder.iterdir())) == 1
    change(opener).close()
    assert len(list(opener.folder.iterdir())) == 2


@pytest.mark.parametrize("keeps", KEEPS)
def test_other_lists_of_rows_compute_only_what_no_list_had(keeps: Keeps, opener: Opener) -> None:
    first = opener(keeps)
    expected = first.rows([4, 2, 0])
    first.close()
    opener.data_rows = [opener.data_rows[i] for i in (4, 3, 2, 0)]
    teacher = opener(keeps)
    assert_same_bits(teacher.rows([0, 2, 3]), expected)
    assert teacher.num_computed == 0
    teacher.rows([1])
    assert teacher.num_computed == 1
    teacher.close()


@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
def test_hidden_and_expected_rows_give_the_same_loss_and_gradient(
    ce_weight: float, opener: Opener
) -> None:
    indices = [1, 2, 4]
    targets = collate(opener.data_rows, indices).targets_N
    student_hidden = torch.randn(
        len(targets), 64, generator=torch.Generator().manual_seed(2)
    ).requires_grad_()
    weight = head_of(opener.model).weight_VH.detach()
    objective = TokenObjective(ce_weight=ce_weight)
    gradients, sums = [], []
    for keeps in KEEPS[:2]:
        teacher = opener(keeps)
        loss, stats = fused_distillation_loss(
            student_hidden,
            Head(weight),
            targets,
            teacher.rows(indices),
            objective,
            denominator=float(len(targets)),
        )
        loss.backward()
        gradients.append(student_hidden.grad)
        student_hidden.grad = None
        sums.append(stats.sums)
        teacher.close()
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("keeps", KEEPS)
def test_rows_of_states_that_were_computed_before_equal_computed_ones(
    opener: Opener, tmp_path: Path, keeps: Keeps
) -> None:
    hidden = LiveTeacher(opener.model).hidden(opener.data_rows)
    teacher, progress = opener(keeps), []
    teacher.keep(
        lambda i: None if i == 2 else hidden[i],
        lambda done, wanted: progress.append((done, wanted)),
    )
    assert progress == [(0, len(LENGTHS))]
    assert not teacher.has_all_rows
    found = teacher.rows(range(len(LENGTHS)))
    assert (teacher.num_kept, teacher.num_computed, teacher.has_all_rows) == (5, 1, True)
    alone = Opener(opener.model, opener.data_rows, tmp_path / "other")(keeps)
    # kept rows are packed together, so their matmuls may sum in another order than those of one row
    for one, other in zip(tensors(found), tensors(alone.rows(range(len(LENGTHS)))), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_rows_are_packed_in_batches_and_all_are_kept(
    opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.distill.teachers.cached_teacher.KEPT_AT_ONCE", 40)
    hidden = LiveTeacher(opener.model).hidden(opener.data_rows)
    teacher, progress = opener("expected"), []
    teacher.keep(hidden.__getitem__, lambda done, wanted: progress.append((done, wanted)))
    assert progress == [(num_done, len(LENGTHS)) for num_done in (0, 2, 4)]
    assert (teacher.num_kept, teacher.has_all_rows) == (len(LENGTHS), True)


def test_rows_in_the_cache_are_not_replaced_by_states(opener: Opener) -> None:
    before = opener()
    rows = before.rows([0])
    before.keep(lambda i: torch.zeros(opener.data_rows[i].num_targets, 64), lambda *_: None)
    assert before.num_kept == len(LENGTHS) - 1
    assert_same_bits(before.rows([0]), rows)


def test_without_a_cache_no_states_are_kept(opener: Opener) -> None:
    teacher = opener(budget_bytes=10)
    teacher.keep(lambda i: torch.zeros(opener.data_rows[i].num_targets, 64), lambda *_: None)
    assert (teacher.num_kept, teacher.has_all_rows) == (0, False)
