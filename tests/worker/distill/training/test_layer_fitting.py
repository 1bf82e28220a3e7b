"""Fitted layers: the regression against a plain solver, positions that meet, every family, and what is left alone."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from app.contracts.distillation import Student
from tests.tiny import save_tiny
from worker.cpu.short_attention import use_short_attention
from worker.distill.data.batching import collate
from worker.distill.data.rows import Example
from worker.distill.forward.hidden_states import decoder_states
from worker.distill.forward.packing import packing_of
from worker.distill.students.recipe import StudentRecipe, load_model, load_student, plan_student
from worker.distill.training.devices import Device, Placement
from worker.distill.training.layer_fitting import (
    RIDGE,
    WRITERS,
    Fit,
    NoPlainStream,
    fit_layers,
    fit_student,
    load_start,
    ridge,
    rows_that_fit,
    stacks_to_fit,
)

SYSTEM = tuple(range(20, 32))
FAMILIES = ("llama", "qwen3", "gpt2", "bloom", "opt", "gpt_neox", "starcoder2", "t5")
POST_NORM = ("bart", "encoder-decoder")  # their layers norm the stream itself
HALF = Student(num_layers=2)


def examples(
    num_rows: int, *, seed: int = 0, begin: Sequence[int] = (), has_source: bool = False
) -> list[Example]:
    """Random rows of several lengths; each has its last half as targets."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(num_rows):
        length = 10 + 3 * (number % 5)
        own = torch.randint(40, 120, (2 * length,), generator=generator).tolist()
        source, tokens = (tuple(own[length:]), own[:length]) if has_source else ((), own[:length])
        ids = (*begin, *tokens)
        found.append(Example(ids, ((len(ids) - length // 2, len(ids)),), number, source))
    return found


def rows_for(family: str, num_rows: int, *, seed: int = 0) -> list[Example]:
    return examples(num_rows, seed=seed, has_source=family in ("t5", "bart", "encoder-decoder"))


def planned(folder: Path, student: Student = HALF) -> StudentRecipe:
    return plan_student(folder, folder, student)


def fit(model: PreTrainedModel, recipe: StudentRecipe, rows: Sequence[Example]) -> Fit:
    return fit_student(model, recipe, rows, torch.float32, lambda: None)


def writers(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, m) for name, m in layer.named_modules() if name.rpartition(".")[2] in WRITERS]


def states(model: PreTrainedModel, rows: Sequence[Example]) -> Tensor:
    batch = collate(rows, range(len(rows)))
    with torch.no_grad():
        return decoder_states(model, batch)[batch.attention_mask_BT.bool()]


def distance(model: PreTrainedModel, start: PreTrainedModel, rows: Sequence[Example]) -> float:
    wanted = states(start, rows)
    return float((states(model, rows) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_regression_is_the_one_that_a_plain_solver_finds(has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs_NI, wanted_NH = (torch.randn(60, n, generator=generator) + 1 for n in (7, 5))
    weights_N = torch.rand(60, generator=generator) + 0.1
    D_HI, b_H = ridge(inputs_NI, wanted_NH, weights_N, has_bias=has_bias)
    w_N1 = (weights_N / weights_N.sum()).sqrt()[:, None].double()
    centre = (lambda t: t - (w_N1**2 * t).sum(dim=0)) if has_bias else (lambda t: t)
    a_NI, r_NH = w_N1 * centre(inputs_NI.double()), w_N1 * centre(wanted_NH.double())
    strength = (RIDGE * a_NI.pow(2).sum(dim=0).mean()).sqrt()
    # a ridge is least squares with rows that ask for zero
    rows = torch.cat([a_NI, strength * torch.eye(7)]), torch.cat([r_NH, torch.zeros(7, 5)])
    expected_HI = torch.linalg.lstsq(*rows).solution.t()
    # the sums are float32
    torch.testing.assert_close(D_HI.double(), expected_HI, rtol=1e-4, atol=1e-5)
    left_NH = wanted_NH - inputs_NI @ D_HI.t() - b_H
    mean_H = (weights_N[:, None] * left_NH).sum(dim=0) / weights_N.sum()
    torch.testing.assert_close(mean_H, torch.zeros(5) if has_bias else mean_H, rtol=0, atol=1e-5)
    assert has_bias or not b_H.any()


@pytest.mark.parametrize("inputs_NI", [torch.zeros(9, 4), torch.full((9, 4), torch.nan)])
def test_without_a_solution_nothing_moves(inputs_NI: Tensor) -> None:
    found = ridge(inputs_NI, torch.ones(9, 3), torch.ones(9), has_bias=False)
    assert not any(tensor.any() for tensor in found)


@pytest.mark.parametrize("family", FAMILIES)
def test_fitted_layers_come_nearer_to_the_start_on_rows_that_they_have_not_seen(
    family: str, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "start", family)
    start = load_model(folder)
    with (
        torch.no_grad()
    ):  # each layer adds a little, as in models that were trained; random ones are chaos
        for name, parameter in start.named_parameters():
            if name.split(".")[-2] in WRITERS:
                parameter *= 0.02
    start.save_pretrained(folder)
    recipe = planned(folder)
    rows, unseen = rows_for(family, 40), rows_for(family, 12, seed=9)
    model = load_student(recipe, None, seed=0)
    before = distance(model, start, unseen)
    found = fit(model, recipe, rows)
    assert (found.num_layers, found.num_rows, found.why_not) == (2, 40, None)
    assert "fitted 2 layers" in found.message
    assert distance(model, start, unseen) < 0.9 * before
    plain = recipe.build().state_dict()
    moved = {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, plain[name])
    }
    assert moved
    assert all(name.split(".")[-2] in WRITERS and not name.startswith("encoder.") for name in moved)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("begin", [(), SYSTEM], ids=["no two alike", "all alike at first"])
def test_layers_that_did_nothing_are_not_missed(
    family: str, begin: tuple[int, ...], tmp_path: Path
) -> None:
    """Positions of the two models that did not meet would have the writers make up for it.

    Of the kept layer before them only the first writer does something: the second would be helped by it.
    """
    folder = save_tiny(tmp_path / "start", family)
    start = load_model(folder)
    recipe = planned(folder)
    with torch.no_grad():
        for stack in stacks_to_fit(recipe, recipe.build(), start.config):
            for number in (0, 1, 2):
                for _, writer in writers(start.get_submodule(f"{stack.name}.{number}"))[
                    number == 0 :
                ]:
                    for parameter in writer.parameters():
                        parameter.zero_()
    start.save_pretrained(folder)
    rows = examples(20, begin=begin, has_source=family == "t5")
    model = load_student(recipe, None, seed=0)
    packs = family not in ("bloom", "t5")
    assert (packing_of(model, collate(rows, range(20))) is not None) == packs
    assert fit(model, recipe, rows).num_layers == 2
    for name, tensor in recipe.build().state_dict().items():
        # rounding of the streams, which the regression spreads over a matrix
        torch.testing.assert_close(
            model.state_dict()[name], tensor, rtol=0, atol=1e-4 * float(tensor.abs().max() + 1)
        )


def test_a_packed_fit_is_the_padded_one(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama")
    recipe, rows = planned(folder), examples(20)
    fitted = []
    for is_packed in (True, False):
        model, start = load_student(recipe, None, seed=0), load_model(folder)
        use_short_attention(start)
        if not is_packed:
            for each in (model, start):
                each.set_attn_implementation("sdpa")
        assert (packing_of(model, collate(rows, range(20))) is not None) == is_packed
        fit_layers(model, start, stacks_to_fit(recipe, model, start.config), rows, lambda: None)
        fitted.append(model.state_dict())
    for name, tensor in fitted[1].items():
        # sums in another order
        torch.testing.assert_close(fitted[0][name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", POST_NORM)
def test_layers_that_do_more_than_add_are_left_alone_and_the_user_is_told(
    family: str, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "start", family)
    recipe, rows = planned(folder, Student(num_decoder_layers=2)), rows_for(family, 6)
    model = load_student(recipe, None, seed=0)
    before = copy.deepcopy(model.state_dict())
    found = fit(model, recipe, rows)
    assert found.num_layers == 0
    assert "no layers are fitted" in found.message
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_which_layer_stands_for_which(tmp_path: Path) -> None:
    llama, t5 = save_tiny(tmp_path / "llama", "llama"), save_tiny(tmp_path / "t5", "t5")

    def fitted(folder: Path, student: Student) -> list[dict[int, int]]:
        recipe = planned(folder, student)
        model = recipe.build()
        return [dict(s.fitted) for s in stacks_to_fit(recipe, model, load_model(folder).config)]

    assert fitted(llama, Student(num_layers=2)) == [{0: 2, 1: 3}]
    assert fitted(llama, Student(num_layers=3)) == [{1: 2, 2: 3}]
    assert fitted(llama, Student(layers=(1, 2))) == [{0: 1, 1: 3}]  # and for the one before it
    assert fitted(llama, Student(num_layers=4)) == []
    assert fitted(llama, Student(num_layers=2, fit_rows=0)) == []
    assert fitted(t5, Student(num_decoder_layers=1)) == [{0: 3}]
    # behind an encoder that is no longer what it was every layer is fitted
    assert fitted(t5, Student(num_encoder_layers=3, num_decoder_layers=4)) == [
        {1: 2, 2: 3},
        {0: 0, 1: 1, 2: 2, 3: 3},
    ]


def test_no_more_rows_are_taken_than_memory_is_planned_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "start", "llama")
    recipe, rows = planned(folder), examples(10)
    stacks = stacks_to_fit(recipe, recipe.build(), load_model(folder).config)
    model = recipe.build()
    assert rows_that_fit(rows, stacks, model) == 10
    num_tokens = sum(row.num_tokens for row in rows[:4])
    monkeypatch.setattr(
        "worker.distill.training.layer_fitting.FIT_BYTES", num_tokens * 2 * 2 * 4 * 64
    )
    assert rows_that_fit(rows, stacks, model) == 4
    monkeypatch.setattr("worker.distill.training.layer_fitting.FIT_BYTES", 1)
    assert rows_that_fit(rows, stacks, model) == 1
    monkeypatch.setattr("worker.distill.training.layer_fitting.FIT_BYTES", 2**30)
    asked = planned(folder, Student(num_layers=2, fit_rows=3))
    assert fit(load_student(asked, None, seed=0), asked, rows).num_rows == 3


def test_a_stop_is_heard_while_the_start_reads(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "start", "llama")
    recipe, rows = planned(folder), examples(40)
    calls: list[None] = []

    def tell() -> None:
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt

    model = load_student(recipe, None, seed=0)
    with pytest.raises(KeyboardInterrupt):
        fit_student(model, recipe, rows, torch.float32, tell)
    assert all(
        torch.equal(tensor, recipe.build().state_dict()[n])
        for n, tensor in model.state_dict().items()
    )


def test_a_recipe_may_leave_the_fit_out(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "start", "llama")
    recipe = replace(planned(folder), fits_layers=False)
    rows = examples(6)
    model = load_student(recipe, None, seed=0)
    assert fit(model, recipe, rows) == Fit()
    assert Fit().message == ""


def test_a_model_of_another_kind_says_so_before_anything_moves(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "bart")
    recipe = planned(folder, Student(num_decoder_layers=2))
    model = load_student(recipe, None, seed=0)
    start = load_model(folder)
    with pytest.raises(NoPlainStream):
        fit_layers(
            model,
            start,
            stacks_to_fit(recipe, model, model.config),
            rows_for("bart", 4),
            lambda: None,
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_start_in_bfloat16_fits_nearly_as_well(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / family, family)
    recipe, rows, start = planned(folder), rows_for(family, 24), load_model(folder)
    plain, exact, rounded = (load_student(recipe, None, seed=0) for _ in range(3))
    fit(exact, recipe, rows)
    placement = Placement(teacher_dtype=torch.bfloat16)
    done = fit_student(rounded, recipe, rows, torch.float32, lambda: None, placement=placement)
    assert done.num_layers > 0
    distances = [distance(model, start, rows) for model in (plain, exact, rounded)]
    assert distances[2] - distances[1] < 0.1 * (distances[0] - distances[1])


@pytest.mark.parametrize(
    ("is_teacher_first", "wanted"),
    [(False, ("meta", torch.bfloat16)), (True, ("cpu", torch.float32))],
)
def test_the_start_is_loaded_where_there_is_room_beside_the_student(
    tiny_llama_dir: Path, *, is_teacher_first: bool, wanted: tuple[str, torch.dtype]
) -> None:
    placement = Placement(Device("cuda"), "meta", torch.bfloat16, is_teacher_first=is_teacher_first)
    start = load_start(planned(tiny_llama_dir), placement)
    assert {(p.device.type, p.dtype) for p in start.parameters()} == {wanted}
