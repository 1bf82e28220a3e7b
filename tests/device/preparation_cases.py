"""Cases of what comes before and beside the training: layers, teacher adaptation, feature losses."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import PreTrainedModel

from app.contracts.distillation import AttentionTerm, HiddenTerm, Student
from tests.device.fake_cuda import fake_cuda
from tests.device.op_log import OpLog
from tests.device.trainers import rows, trainer_of
from worker.distill.students.recipe import load_model, plan_student
from worker.distill.training.devices import Placement, find_device
from worker.distill.training.feature_losses import FeaturePlan
from worker.distill.training.layer_choice import measure_angles
from worker.distill.training.teacher_adaptation import Adaptation, adapted_model

Json = dict[str, Any]  # Any: open-ended JSON
CUT = Student(num_layers=2, fit_rows=8, freeze_head=False)
CUT_BOTH = CUT.model_copy(update={"num_encoder_layers": 2})


def layer_fit(folders: Path) -> Json:
    """The layer fitting of a causal student."""
    with fake_cuda():
        return fit_of(folders / "llama", CUT)


def seq2seq_layer_fit(folders: Path) -> Json:
    """The same for both stacks of an encoder-decoder."""
    with fake_cuda():
        return fit_of(folders / "t5", CUT_BOTH, source_tokens=9)


def layer_fit_from_the_cpu(folders: Path) -> Json:
    """The layer fitting with a start model that does not fit on the card."""
    with fake_cuda():
        placement = Placement(find_device(), "cuda", torch.bfloat16, is_teacher_first=True)
        # the packed weights of a CPU have no fake kernel
        with patch("worker.distill.training.layer_fitting.prepare_for_inference"):
            return fit_of(folders / "llama", CUT, placement=placement)


def fit_of(folder: Path, student: Student, **changes: Any) -> Json:
    """Observes a layer fitting."""
    trainer = trainer_of(folder, student=student, **changes)
    with OpLog(truth=False) as log:  # no layer differs from a plain one
        trainer.fit()
    parameters = list(trainer.model.parameters())
    return {
        "waits": log.waits,
        "num_fitted": trainer.state.num_fitted_layers,
        "matmul_dtypes": log.num_of_dtypes("mm"),
        "solved_on": log.devices_of("cholesky_solve"),
        "parameter_devices": sorted({p.device.type for p in parameters}),
        "parameter_dtypes": sorted({str(p.dtype) for p in parameters}),
    }


def layer_choice(folders: Path) -> Json:
    """The measurement by which layers are chosen."""
    with fake_cuda():
        recipe = plan_student(folders / "llama", folders / "llama", CUT)
        placement = Placement(find_device(), "cuda", torch.bfloat16)
        with OpLog() as log:
            measure_angles(recipe, rows(8), torch.float32, placement)
        return {"waits": log.waits, "matmul_dtypes": log.num_of_dtypes("mm")}


def feature_step(folders: Path) -> Json:
    """A step with both feature losses, of pairs whose widths agree."""
    with fake_cuda():
        return step_with_features(folders / "llama", folders / "llama")


def seq2seq_feature_step(folders: Path) -> Json:
    """The same for the encoders of an encoder-decoder pair."""
    with fake_cuda():
        return step_with_features(folders / "t5", folders / "t5", source_tokens=9)


def masked_feature_step(folders: Path) -> Json:
    """The same for a causal student that learns from the states of a masked teacher."""
    with fake_cuda():
        return step_with_features(folders / "llama", folders / "bert")


def step_with_features(folder: Path, teacher: Path, **changes: Any) -> Json:
    """Observes the second step of a training with feature losses."""

    def load_teacher() -> PreTrainedModel:
        model: PreTrainedModel = load_model(teacher, torch.bfloat16)
        return model.to("cuda").requires_grad_(False)

    examples = rows(12, source_tokens=changes.get("source_tokens", 0))
    plan = FeaturePlan(HiddenTerm(), AttentionTerm(), load_teacher, examples, 0)
    trainer = trainer_of(folder, features=plan, **changes)
    with OpLog():
        trainer._step(trainer._next_pieces())
    with OpLog() as log:
        trainer._step(trainer._next_pieces())
    return {"waits": log.waits, "matmul_dtypes": log.num_of_dtypes("mm")}


def adaptation(folders: Path) -> Json:
    """The adaptation of a masked teacher in two steps."""
    with fake_cuda():
        asked = Adaptation(
            teacher_dir=folders / "bert",
            identity="tiny",
            mask_id=4,
            rows=rows(8),
            steps=1,
            batch_tokens=128,
            seed=0,
            device="cuda",
            autocast=torch.bfloat16,
        )
        seen = []
        for num_steps in (1, 2):
            with OpLog() as log:
                model = adapted_model(replace(asked, steps=num_steps), lambda done, planned: None)
            seen.append(log)
        one, two = seen
        return {
            "waits_of_a_step": two.waits[len(one.waits) :],
            "matmul_dtypes": two.num_of_dtypes("mm") | two.num_of_dtypes("addmm"),
            "parameters": sorted({f"{p.dtype} on {p.device.type}" for p in model.parameters()}),
        }


CASES = (
    layer_fit,
    seq2seq_layer_fit,
    layer_fit_from_the_cpu,
    layer_choice,
    feature_step,
    seq2seq_feature_step,
    masked_feature_step,
    adaptation,
)
