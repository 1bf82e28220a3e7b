"""The student runs of a job: one per size of a ladder, with what is measured for them beforehand."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from app.contracts.distillation import Objective
from worker.distill.data.rows import Example
from worker.distill.data_parallel import Ranks
from worker.distill.decisions import Decision
from worker.distill.students.recipe import StudentRecipe, plan_student
from worker.distill.teachers.signals import Signal
from worker.distill.training.checkpoint import KeptLayers, TrainState
from worker.distill.training.devices import Placement
from worker.distill.training.inputs import TrainingInputs
from worker.distill.training.layer_choice import Angles, measure_angles, with_chosen_layers
from worker.protocol.run_lines import Sink
from worker.protocol.run_spec import RunSpec

NUM_CALIBRATION = 8  # rows on which width pruning measures importance
Json = dict[str, Any]  # Any: part of the public result
STUDENT = "student"  # label of the only student of a job without a ladder


@dataclass(frozen=True)
class StudentRun:
    """The training of one student. A baseline learns from the text alone."""

    label: str
    recipe: StudentRecipe
    is_baseline: bool = False
    has_known_layers: bool = True  # False if an older version, which did not store them, began it

    @property
    def decisions(self) -> list[Decision]:
        """The choice of the layers, if the job does not name them."""
        recipe = self.recipe
        reason = recipe.reason_for_layers
        if reason is None or self.is_baseline or not self.has_known_layers:
            return []
        value: Json = {"layers": list(recipe.layers or ())}  # as after reading a checkpoint
        if recipe.encoder_layers is not None:
            value["encoder_layers"] = list(recipe.encoder_layers)
        return [Decision(option="student.layers", value=value, reason=reason, words=_kept(recipe))]

    @property
    def name(self) -> str:
        if self.is_baseline:
            return "the baseline on the text only"
        return self.label if self.label == STUDENT else f"{STUDENT} of {self.label}"

    def setup(self, setup: TrainingInputs) -> TrainingInputs:
        """Returns the training inputs of this run, derived from those of the job."""
        setup = replace(setup, recipe=self.recipe)
        if not self.is_baseline:
            return setup
        objective = Objective(teacher_signal="text")
        signal = Signal("text", "the baseline has no teacher")
        recipe = replace(self.recipe, fits_layers=False)  # that needs the teacher
        return replace(setup, recipe=recipe, objective=objective, signal=signal, features=None)


def plan_student_runs(spec: RunSpec) -> list[StudentRun]:
    """Returns a run per student, the smallest first. Raises the errors of `plan_student`."""
    student = spec.distillation.student
    return [
        StudentRun(
            STUDENT if size is None else f"{size} layer{'s' if size > 1 else ''}",
            plan_student(spec.teacher_dir, spec.start_dir, student, size, seed=spec.seed),
        )
        for size in (student.ladder or (None,))
    ]


def calibrated(runs: Sequence[StudentRun], rows: Sequence[Example]) -> list[StudentRun]:
    """Returns the runs with calibration rows, on which width pruning measures what to keep."""
    sequences = [
        ids for row in rows[:NUM_CALIBRATION] for ids in (row.source_ids, row.token_ids) if ids
    ]
    return [replace(c, recipe=replace(c.recipe, calibration=tuple(sequences))) for c in runs]


def with_measured_layers(
    runs: Sequence[StudentRun],
    rows: Sequence[Example],
    *,
    state: TrainState | None,
    matmul_dtype: torch.dtype,
    placement: Placement,
    ranks: Ranks,
    sink: Sink,
) -> list[StudentRun]:
    """Returns the runs with the layers to keep, and writes an event for each choice.

    The first rank measures. All runs start from the same model, so it is measured once.

    A resumed job keeps the layers of `state`, which is that of its checkpoint, else None. If an
    older version wrote that checkpoint, the layers are measured. Nothing is reported for runs that
    had begun, because that version may have chosen other layers.
    """
    if state is not None and state.kept_layers is not None:
        return [
            replace(run, recipe=replace(run.recipe, **dict(kept)))
            for run, kept in zip(runs, state.kept_layers, strict=True)
        ]
    chosen = list(runs)
    if any(run.recipe.measures_layers for run in runs):
        found = ranks.from_first(
            lambda: {"angles": measure_angles(runs[0].recipe, rows, matmul_dtype, placement)}
        )
        angles: list[Angles] = found["angles"]
        chosen = [
            replace(run, recipe=with_chosen_layers(run.recipe, angles))
            if run.recipe.measures_layers
            else run
            for run in runs
        ]
    num_begun = 0 if state is None else len(state.finished) + 1
    chosen = [replace(run, has_known_layers=i >= num_begun) for i, run in enumerate(chosen)]
    for run in chosen:
        for decision in run.decisions:
            sink(decision.event(f"{run.name}: "))
    return chosen


def kept_layers(runs: Sequence[StudentRun]) -> tuple[KeptLayers, ...]:
    """Returns the layers that the student of each run keeps, for the checkpoint."""
    return tuple(
        KeptLayers(layers=run.recipe.layers, encoder_layers=run.recipe.encoder_layers)
        for run in runs
    )


def _kept(recipe: StudentRecipe) -> str:
    """Returns the words for the layers that a student keeps."""
    words = f"layers {_ranges(recipe.layers or ())} of {recipe.num_available}"
    if recipe.encoder_layers is not None:
        words = f"encoder layers {_ranges(recipe.encoder_layers)} and decoder {words}"
    return f"kept {words}"


def _ranges(numbers: Sequence[int]) -> str:
    """Returns ascending numbers as text, such as "0-1, 17-29"."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    pairs = zip(starts, ends, strict=True)
    return ", ".join(str(start) if start == end else f"{start}-{end}" for start, end in pairs)
