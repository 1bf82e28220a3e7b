"""Jobs that do not fit get advice, and what it names does fit."""

from dataclasses import replace
from typing import Any

import pytest

from app.contracts.distillation import Distillation
from app.contracts.job_memory import cpu_bytes, device_bytes
from app.contracts.model_sizes import LayerStack, ModelSizes
from app.contracts.planned_jobs import PlannedJob, RowCounts
from app.services.estimates.limits import Machine, advice, smaller_jobs

GIB = 2**30
# A model with a billion parameters: 16 layers of width 2048.
LARGE = ModelSizes(
    (LayerStack(16, 10_500_000, 50_300_000, 45_000),), 0, 262_000_000, True, 2048, 8192, 32
)
ROWS = RowCounts(
    num_train=1000, num_valid=100, train_tokens=300_000, train_targets=200_000, valid_tokens=30_000,
    valid_targets=20_000, teacher_tokens=330_000, num_unanswered=0, prompt_tokens=100, answer_tokens=200,
    longest_tokens=500, num_steps=900, num_epochs=3.0, num_evals=10,
)  # fmt: skip


def planned(*, has_teacher: bool = True, **block: Any) -> PlannedJob:
    options = Distillation.model_validate({"teacher": "t", **block})
    return PlannedJob(options, has_teacher, LARGE, LARGE, has_expected_rows=False)


def test_a_smaller_batch_is_advised_if_it_fits() -> None:
    job = planned(student={"num_layers": 8}, hyperparameters={"batch_tokens": 100_000})
    small = replace(job, block=next(smaller_jobs(job))[1])
    machine = Machine("cpu", True, cpu_bytes(small, ROWS, has_bfloat16=True) + 1)
    assert not machine.has_room(job, ROWS)
    assert advice(job, ROWS, machine) == "this would fit: hyperparameters.batch_tokens = 64"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fewer_layers_are_advised_if_they_fit(device: str) -> None:
    job = planned(student={"num_layers": 12}, hyperparameters={"batch_tokens": 64})
    needed = {"cpu": cpu_bytes, "cuda": device_bytes}[device]
    _, half, quarter = (
        replace(job, block=block) for _, block in [("", job.block), *smaller_jobs(job)]
    )
    sizes = [needed(j, ROWS, has_bfloat16=True) for j in (job, half, quarter)]
    assert sizes == sorted(sizes, reverse=True)
    assert advice(job, ROWS, Machine(device, True, sizes[2])).startswith(
        "this would fit: student.num_layers = "
    )
    assert "smaller model" in advice(job, ROWS, Machine(device, True, sizes[2] // 4))


def test_adapters_are_advised_to_supervised_jobs() -> None:
    job = planned(has_teacher=False, student={"init": "checkpoint", "freeze_head": False})
    assert 10 * GIB < cpu_bytes(job, ROWS, has_bfloat16=True) < 30 * GIB
    assert "supervised.lora" in advice(job, ROWS, Machine("cpu", True, 12 * GIB))


def test_an_unknown_memory_is_enough() -> None:
    assert Machine().has_room(planned(), ROWS)
