from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.worker.memory_sink import MemorySink
from worker.distill.data.rows import Example
from worker.distill.data_parallel import ALONE
from worker.distill.student_runs import (
    StudentRun,
    calibrated,
    kept_layers,
    plan_student_runs,
    with_measured_layers,
)
from worker.distill.training.checkpoint import KeptLayers, TrainState
from worker.distill.training.devices import ON_CPU
from worker.distill.training.layer_choice import choose_layers, measure_angles
from worker.errors import StudentTooDeep
from worker.protocol.run_lines import MessageLine
from worker.protocol.run_spec import RunSpec

MakeSpec = Callable[..., RunSpec]
ROWS = [Example((5, 6, i + 10), ((2, 3),), line=i) for i in range(20)]


def test_a_ladder_has_a_run_for_each_size_the_smallest_first(make_spec: MakeSpec) -> None:
    runs = plan_student_runs(make_spec({"student": {"num_layers": [3, 1, 3, 2]}}))
    assert [run.label for run in runs] == ["1 layer", "2 layers", "3 layers"]
    assert [run.recipe.layers for run in runs] == [(0,), (0, 3), (0, 1, 3)]
    assert runs[1].name == "student of 2 layers"


def test_a_single_student_is_one_run(make_spec: MakeSpec) -> None:
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


def measured(
    spec: RunSpec, rows: list[Example] = ROWS, state: TrainState | None = None
) -> tuple[list[StudentRun], MemorySink]:
    sink = MemorySink()
    runs = with_measured_layers(
        plan_student_runs(spec),
        rows,
        state=state,
        matmul_dtype=torch.float32,
        placement=ON_CPU,
        ranks=ALONE,
        sink=sink,
    )
    return runs, sink


def messages(sink: MemorySink) -> list[str]:
    return [line.message for line in sink.lines if isinstance(line, MessageLine)]


def test_a_ladder_keeps_the_measured_layers_and_says_which(make_spec: MakeSpec) -> None:
    runs, sink = measured(make_spec({"student": {"num_layers": [1, 2, 4], "fit_rows": "auto"}}))
    (angles,) = measure_angles(runs[0].recipe, ROWS, torch.float32, ON_CPU)
    assert [run.recipe.layers for run in runs] == [choose_layers(angles, n) for n in (1, 2, 4)]
    found = messages(sink)
    assert found[0].startswith("student of 1 layer: kept layers ")
    assert "of 4, because" in found[0]
    assert len(found) == 2  # the third student keeps all layers


def test_a_resumed_ladder_keeps_the_layers_of_its_checkpoint(make_spec: MakeSpec) -> None:
    spec = make_spec({"student": {"num_layers": [1, 2], "fit_rows": "auto"}})
    runs, _ = measured(spec)
    state = TrainState(kept_layers=kept_layers(runs))
    read = TrainState.model_validate_json(state.model_dump_json())
    again, sink = measured(spec, state=read)
    assert again == runs
    assert sink.lines == []
    others = tuple(KeptLayers(layers=layers, encoder_layers=None) for layers in ((3,), (2, 3)))
    again, _ = measured(spec, state=TrainState(kept_layers=others))
    assert [run.recipe.layers for run in again] == [(3,), (2, 3)]


def test_a_checkpoint_without_layers_gives_events_only_for_later_runs(make_spec: MakeSpec) -> None:
    spec = make_spec({"student": {"num_layers": [1, 2, 3], "fit_rows": "auto"}})
    runs, sink = measured(spec, state=TrainState(finished=({"label": "1 layer"},)))
    assert all(run.recipe.layers for run in runs)
    (line,) = sink.lines
    assert isinstance(line, MessageLine)
    assert line.message.startswith("student of 3 layers: kept layers ")


def test_a_size_with_few_layers_keeps_the_first_and_last_ones(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.distill.students.recipe.LEAST_MEASURED_SHARE", 0.6)
    runs, sink = measured(make_spec({"student": {"num_layers": [2, 3], "fit_rows": "auto"}}))
    assert [run.recipe.measures_layers for run in runs] == [False, True]
    assert runs[0].recipe.layers == (0, 3)
    first, second = messages(sink)
    assert first == (
        "student of 2 layers: kept layers 0, 3 of 4, because the first and last layers are the "
        "better start if few are kept"
    )
    assert "by the smallest angle" in second


MEASURED, NOT_FITTED = "by the smallest angle", "only if they are fitted"


@pytest.mark.parametrize(
    ("student", "is_measured", "reason"),
    [
        ({"num_layers": 2, "fit_rows": "auto"}, True, MEASURED),
        ({"num_layers": 2, "fit_rows": 0}, False, NOT_FITTED),
        ({"num_layers": 2, "fit_rows": 0, "layer_choice": "measured"}, True, MEASURED),
        ({"num_layers": 2, "fit_rows": "auto", "layer_choice": "first_and_last"}, False, None),
        ({"layers": [0, 1], "fit_rows": "auto"}, False, None),
        ({"num_layers": 4, "fit_rows": "auto"}, False, None),
    ],
)
def test_layers_are_measured_unless_they_are_named_or_not_fitted(
    make_spec: MakeSpec, student: dict[str, object], is_measured: bool, reason: str | None
) -> None:
    runs, sink = measured(make_spec({"student": student}))
    assert runs[0].recipe.measures_layers is is_measured
    assert len(sink.lines) == (reason is not None)
    assert all(reason in message for message in messages(sink) if reason)


def test_layers_of_an_encoder_decoder_are_measured_only_on_request(
    make_spec: MakeSpec, tiny_t5_dir: Path
) -> None:
    folders = {"teacher_dir": tiny_t5_dir, "start_dir": tiny_t5_dir}
    student = {"num_decoder_layers": 1, "fit_rows": "auto"}
    (run,), sink = measured(make_spec({"student": student}, spec=folders))
    assert not run.recipe.measures_layers
    assert "because an encoder-decoder" in messages(sink)[0]


def test_the_encoders_layers_are_measured_too(make_spec: MakeSpec, tiny_t5_dir: Path) -> None:
    folders = {"teacher_dir": tiny_t5_dir, "start_dir": tiny_t5_dir}
    student = {
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "fit_rows": "auto",
        "layer_choice": "measured",
    }
    rows = [replace(row, source_ids=(7, 8, 9 + row.line)) for row in ROWS]
    (run,), sink = measured(make_spec({"student": student}, spec=folders), rows)
    encoder, decoder = measure_angles(run.recipe, rows, torch.float32, ON_CPU)
    assert run.recipe.encoder_layers == choose_layers(encoder, 1)
    assert run.recipe.layers == choose_layers(decoder, 1)
    assert "encoder layers" in messages(sink)[0]
