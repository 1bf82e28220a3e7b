from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from worker.distill.data.rows import Example
from worker.distill.student_sweep import calibrated, plan_student_runs
from worker.errors import StudentTooDeep
from worker.protocol.run_spec import RunSpec

MakeSpec = Callable[..., RunSpec]
ROWS = [Example((5, 6, i + 10), ((2, 3),), line=i) for i in range(20)]


def test_a_ladder_has_a_course_for_each_size_the_smallest_first(make_spec: MakeSpec) -> None:
    runs = plan_student_runs(make_spec({"student": {"num_layers": [3, 1, 3, 2]}}))
    assert [run.label for run in runs] == ["1 layer", "2 layers", "3 layers"]
    assert [run.recipe.layers for run in runs] == [(0,), (0, 3), (0, 1, 3)]
    assert runs[1].name == "student of 2 layers"


def test_a_single_student_is_one_course(make_spec: MakeSpec) -> None:
    (run,) = plan_student_runs(make_spec({"student": {"num_layers": 3}}))
    assert run.name == run.label == "student"
    assert run.recipe.layers is not None
    assert len(run.recipe.layers) == 3


def test_any_size_that_is_too_deep_is_refused(make_spec: MakeSpec) -> None:
    with pytest.raises(StudentTooDeep):
        plan_student_runs(make_spec({"student": {"num_layers": [1, 5]}}))


def test_a_narrower_student_is_cut_by_what_the_first_rows_use(make_spec: MakeSpec) -> None:
    block = {"student": {"init": "width", "intermediate_size": 64, "num_layers": [2, 4]}}
    runs = calibrated(plan_student_runs(make_spec(block)), ROWS)
    assert {run.recipe.calibration for run in runs} == {tuple(row.token_ids for row in ROWS[:8])}
    by_rows = runs[0].recipe
    by_norms = replace(by_rows, calibration=())
    ours, theirs = (
        recipe.build().model.layers[0].mlp.up_proj.weight for recipe in (by_rows, by_norms)
    )
    assert ours.shape == theirs.shape == (64, 64)
    assert not ours.equal(theirs)


def test_both_sides_of_an_encoder_decoder_are_judged(
    make_spec: MakeSpec, tiny_t5_dir: Path
) -> None:
    folders = {"teacher_dir": tiny_t5_dir, "start_dir": tiny_t5_dir}
    runs = plan_student_runs(
        make_spec({"student": {"init": "width", "intermediate_size": 64}}, spec=folders)
    )
    (run,) = calibrated(runs, [replace(ROWS[0], source_ids=(7, 8, 9))])
    assert run.recipe.calibration == ((7, 8, 9), ROWS[0].token_ids)
