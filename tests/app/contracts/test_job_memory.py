"""Estimates of memory, compared with numbers that were computed by hand for one tiny model."""

from dataclasses import replace
from typing import Any

import pytest

from app.contracts.distillation import Distillation
from app.contracts.job_memory import (
    ACTIVATION_FACTOR,
    MIB,
    PROCESS_BYTES,
    DeviceStudent,
    cpu_bytes,
    cpu_phases,
    device_bytes,
    disk_bytes,
    kv_cache_bytes,
    layer_values,
    least_device_bytes,
    mapped_bytes,
)
from app.contracts.model_sizes import LayerKind, LayerStack, ModelSizes
from app.contracts.planned_jobs import PlannedJob, RowCounts

# H = 8, F = 16, V = 100, 4 heads, and 2 key-value heads of width 2. A layer has 8 x 8 queries and
# outputs and 8 x 4 keys and values (192), two norms (16) and three MLP matrices of 8 x 16 (384).
TINY = ModelSizes((LayerStack(4, 208, 384, 0),), 8, 800, True, 8, 16, 4)
NUM_PARAMETERS = 4 * (208 + 384) + 8 + 800  # 3,176
LAYER = 10 * 8 + 4 * 16  # 144 activations per token
ROWS = RowCounts(
    num_train=10, num_valid=2, train_tokens=200, train_targets=100, valid_tokens=40, valid_targets=20,
    teacher_tokens=240, num_unanswered=0, prompt_tokens=10.0, answer_tokens=10.0, longest_tokens=30,
    num_steps=10, num_epochs=1.0, num_evals=1,
)  # fmt: skip


def planned(*, has_teacher: bool = True, **block: Any) -> PlannedJob:
    whole = {
        "teacher": "t",
        "student": {"init": "checkpoint", "freeze_head": False},
        "hyperparameters": {"batch_tokens": 100},
        "evaluation": {"metrics": ["perplexity"], "num_samples": 0},
        **block,
    }
    options = Distillation.model_validate(whole)
    return PlannedJob(options, has_teacher, TINY, TINY, has_expected_rows=False)


def test_the_sizes_are_those_of_the_comment() -> None:
    assert TINY.num_parameters == NUM_PARAMETERS
    assert TINY.kv_size == 4
    assert layer_values(8, 16) == LAYER


def test_a_supervised_job_on_a_cpu_needs_its_training() -> None:
    job = planned(has_teacher=False)
    activations = round(ACTIVATION_FACTOR * 100 * 4 * 4 * LAYER)  # 100 tokens, float32, 4 layers
    chunk = 4 * 100 * 100  # the logits of 100 tokens
    loss = 2 * chunk + 4 * 800  # and the second gradient of the LM head
    training = (4 + 12) * NUM_PARAMETERS + activations + loss
    assert cpu_phases(job, ROWS, has_bfloat16=False)["training"] == training
    assert cpu_bytes(job, ROWS, has_bfloat16=False) == PROCESS_BYTES + training
    assert mapped_bytes(job) == 4 * NUM_PARAMETERS


def test_a_teacher_adds_its_packed_weights_and_its_head() -> None:
    job = planned()
    alone, both = (
        cpu_phases(replace(job, has_teacher=has_teacher), ROWS, has_bfloat16=True)
        for has_teacher in (False, True)
    )
    packed = 4 * NUM_PARAMETERS * 3 // 2  # bfloat16 copies beside float32 weights
    head = 4 * 800
    assert both["training"] - alone["training"] == packed + head
    assert both["teacher"] == packed + head + 4 * 100 * 100


def test_a_teacher_that_answers_has_a_kv_cache() -> None:
    # 64 sequences of 10 + 15 tokens, 4 layers with keys and values of width 4, in float32
    cache = 64 * 25 * 2 * 4 * 4 * 4
    assert kv_cache_bytes(TINY, 64, 25, 4) == cache
    rows = replace(ROWS, num_unanswered=1000)
    phases = cpu_phases(planned(), rows, has_bfloat16=False)
    assert phases["teacher"] == 2 * 4 * NUM_PARAMETERS + 4 * 800 + cache


def test_held_out_prompts_that_are_answered_need_a_kv_cache() -> None:
    plain, answered = (
        cpu_phases(
            planned(evaluation={"metrics": [metric], "num_samples": 0}), ROWS, has_bfloat16=True
        )["evaluation"]
        for metric in ("perplexity", "rouge_l")
    )
    assert answered - plain == 2 * 25 * 2 * 4 * 4 * 2  # two held-out rows, in bfloat16


def test_a_student_on_a_gpu() -> None:
    job = planned(has_teacher=False)
    # weights and moments; a bfloat16 copy of a layer; logits in 8 chunks, and the head's gradient
    fixed = (4 + 8) * NUM_PARAMETERS + 2 * (208 + 384) + 8 * 4 * 100 * 100 + 4 * 800
    # Attention: the norm's input and result, three bfloat16 copies of it, queries, keys, values and
    # the result. MLP: the same norm, two copies, and four results of elementwise operations.
    layer = (2 * 4 * 8 + 3 * 2 * 8 + 2 * (8 + 4 + 4 + 8)) + (2 * 4 * 8 + 2 * 2 * 8 + 4 * 2 * 16)
    # In the loss, with activation checkpointing, the last of four layers keeps everything and the
    # others their inputs.
    activations = 100 * (layer + 3 * 4 * 8 + 4 * 4 * 8)
    assert device_bytes(job, ROWS, has_bfloat16=True) == fixed + activations


def test_a_small_batch_needs_the_most_memory_when_all_gradients_exist() -> None:
    student = DeviceStudent(TINY, NUM_PARAMETERS, True, 0, row_tokens=30)
    all_gradients = 4 * NUM_PARAMETERS + 4 * 800  # those of the tied embedding are separate first
    needed = student.peak_bytes(1, has_autocast=False)
    assert needed == student.resident_bytes + all_gradients
    accumulating = replace(student, accumulates=True)
    assert accumulating.peak_bytes(1, has_autocast=False) > needed


def test_an_unknown_share_of_source_tokens_counts_as_the_worst() -> None:
    two = replace(TINY, stacks=TINY.stacks * 2, kinds=(LayerKind(),) * 2)
    student = DeviceStudent(two, NUM_PARAMETERS, True, 0, row_tokens=30)
    kept = [
        replace(student, source_share=share).kept_bytes(100, has_autocast=True)
        for share in (None, 0.0, 0.5, 1.0)
    ]
    assert kept[0] == max(kept)
    frozen = replace(student, has_frozen_encoder=True, source_share=0.5)
    assert frozen.kept_bytes(100, has_autocast=True) < kept[2]


def test_weights_with_adapters_are_kept_in_bfloat16_on_a_gpu() -> None:
    job = planned(has_teacher=False, student={"init": "lora"})
    stack = replace(TINY.stacks[0], linear_width=10)
    job = replace(job, start=replace(TINY, stacks=(stack,)))
    layers, adapters = TINY.layer_parameters, 16 * 4 * 10
    full = DeviceStudent(TINY, adapters, False, 0, row_tokens=30, trains_norms=False)
    lowered = replace(full, num_lowered=layers)
    assert full.resident_bytes - lowered.resident_bytes == 2 * layers
    copies = full.kept_bytes(9, has_autocast=True) - lowered.kept_bytes(9, has_autocast=True)
    assert copies == 2 * layers
    assert device_bytes(job, ROWS, has_bfloat16=False) > device_bytes(job, ROWS, has_bfloat16=True)
    inputs = 50 * 4 * 4 * 8
    least = 4 * NUM_PARAMETERS - 2 * layers + 8 * adapters + inputs
    assert least_device_bytes(job, ROWS) == least


def test_the_least_memory_of_a_gpu_is_that_of_weights_moments_and_half_a_batch() -> None:
    input_bytes = 4 * 4 * 8  # per token, of four layers
    weights = (4 + 8) * NUM_PARAMETERS
    assert least_device_bytes(planned(), ROWS) == weights + 4 * NUM_PARAMETERS  # the gradients
    long = replace(ROWS, longest_tokens=800)
    assert least_device_bytes(planned(), long) == weights + 800 * input_bytes


@pytest.mark.parametrize("keep", [1, 3])
def test_checkpoints_are_two_students_and_two_moments(keep: int) -> None:
    checkpoint = (2 * 4 + 8) * NUM_PARAMETERS + 6 * MIB
    cache = (100 + 20) * (4 * 8 + 8)
    found = disk_bytes(planned(), ROWS, keep_checkpoints=keep)
    assert found == (keep + 1) * checkpoint + 4 * NUM_PARAMETERS + cache


def test_a_quantised_teacher_needs_less_memory() -> None:
    num_linear = 4 * (208 + 384)
    for device, value_bytes in (("gpu", 2), ("cpu", 4)):
        plain, small = (planned(teacher_precision=precision) for precision in ("auto", "int8"))
        if device == "gpu":
            saved = device_bytes(plain, ROWS, has_bfloat16=True)
            saved -= device_bytes(small, ROWS, has_bfloat16=True)
            assert saved in (0, (value_bytes - 1) * num_linear)  # 0 if the student needs more
            continue
        phases = [cpu_phases(job, ROWS, has_bfloat16=False)["teacher"] for job in (plain, small)]
        # the layers have no packed copy, and neither have the embeddings
        assert phases[0] - phases[1] == (8 - 1) * num_linear + 4 * 8
    assert mapped_bytes(small) == TINY.num_bytes  # of the start model
