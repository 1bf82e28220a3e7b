"""Jobs that do not fit get advice, and what it names does fit."""

from dataclasses import replace
from typing import Any

import pytest

from app.contracts.distillation import Distillation
from app.contracts.job_memory import cpu_bytes, device_bytes, least_device_bytes, mapped_bytes
from app.contracts.model_sizes import LayerStack, ModelSizes
from app.contracts.planned_jobs import PlannedJob, RowCounts
from app.contracts.train_workers import MachineProfile, TrainWorkerStatus, supported_precisions
from app.services.estimates.limits import (
    CPU_MARGIN,
    DEVICE_MARGIN,
    Machine,
    advice,
    best_of,
    smaller_jobs,
)

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
    assert advice(job, ROWS, machine) == "this may fit: hyperparameters.batch_tokens = 64"


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
        "this may fit: student.num_layers = "
    )
    assert "smaller model" in advice(job, ROWS, Machine(device, True, sizes[2] // 4))


def test_adapters_are_advised_to_supervised_jobs() -> None:
    job = planned(has_teacher=False, student={"init": "checkpoint", "freeze_head": False})
    assert 10 * GIB < cpu_bytes(job, ROWS, has_bfloat16=True) < 30 * GIB
    assert "supervised.lora" in advice(job, ROWS, Machine("cpu", True, 12 * GIB))


def test_a_gpu_may_hold_what_is_estimated_to_need_more() -> None:
    job = planned(student={"num_layers": 8}, hyperparameters={"batch_tokens": 64})
    least = least_device_bytes(job, ROWS)
    enough = Machine("cuda", True, round(least / DEVICE_MARGIN) + 1)
    assert not enough.has_room(job, ROWS)
    assert enough.may_have_room(job, ROWS)
    assert not Machine("cuda", True, round(least / DEVICE_MARGIN) - 1).may_have_room(job, ROWS)


def test_the_margin_of_a_cpu_does_not_count_mapped_weights() -> None:
    job = planned(student={"num_layers": 8})
    least = cpu_bytes(job, ROWS, has_bfloat16=True) - mapped_bytes(job)
    for change, expected in ((1, True), (-1, False)):
        machine = Machine("cpu", True, round(least / CPU_MARGIN) + change)
        assert machine.may_have_room(job, ROWS) is expected


def test_a_worker_that_was_not_measured_may_hold_any_job() -> None:
    worker = TrainWorkerStatus(worker_id="w", memory_bytes=1, beat_at=0.0)
    assert Machine.of(worker).may_have_room(planned(), ROWS)
    profile = MachineProfile(device="cpu", flops=1.0, has_bfloat16=True)
    measured = worker.model_copy(update={"profile": profile})
    assert not Machine.of(measured).may_have_room(planned(), ROWS)


def test_the_best_machine_is_one_on_which_the_job_fits() -> None:
    job = planned(student={"num_layers": 8})
    small_gpu, large_cpu = Machine("cuda", True, GIB), Machine("cpu", True, 500 * GIB)
    large_gpu, small_cpu = Machine("cuda", True, 80 * GIB), Machine("cpu", True, GIB)
    assert best_of([small_gpu, large_cpu, small_cpu], job, ROWS) == large_cpu
    assert best_of([large_cpu, large_gpu], job, ROWS) == large_gpu
    assert best_of([small_cpu, small_gpu], job, ROWS) == small_gpu


def test_a_machine_with_too_few_devices_is_not_the_best() -> None:
    job = planned(student={"num_layers": 8}, hyperparameters={"num_devices": 4})
    few, many = (Machine("cuda", True, GIB * 80 // num, num) for num in (2, 4))
    assert [machine.has_devices(job) for machine in (few, many, Machine())] == [False, True, True]
    assert best_of([few, many], job, ROWS) == many


def test_an_unknown_memory_is_enough() -> None:
    assert Machine().has_room(planned(), ROWS)


def test_only_workers_that_support_the_precision_of_the_teacher_are_able() -> None:
    asking, plain = planned(teacher_precision="int4"), planned()
    unknown, without, with_int8 = (
        Machine(teacher_precisions=names) for names in (None, (), ("int8",))
    )
    with_int4 = Machine(teacher_precisions=("int8", "int4"))
    machines = [unknown, without, with_int8, with_int4]
    assert [machine.is_able(asking) for machine in machines] == [True, False, False, True]
    assert all(machine.is_able(plain) for machine in machines)
    assert best_of([without, with_int4], asking, ROWS) == with_int4


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        (None, ("int8", "int4")),
        ((7, 5), ("int8",)),
        ((8, 0), ("int8", "int4")),
        ((8, 9), ("int8", "int4", "fp8")),
        ((10, 0), ("int8", "int4", "fp8")),
    ],
)
def test_the_capability_of_a_gpu_decides_on_precisions(
    capability: tuple[int, int] | None, expected: tuple[str, ...]
) -> None:
    assert supported_precisions(has_package=True, capability=capability) == expected
    assert supported_precisions(has_package=False, capability=capability) == ()
