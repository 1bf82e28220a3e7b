from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from app.contracts.distillation import (
    Auto,
    DivergenceName,
    Lora,
    Objective,
    Student,
    TeacherPrecision,
)
from tests.tiny import save_tiny
from worker.distill.forward.hidden_states import autocast
from worker.distill.losses.divergences import TokenObjective
from worker.distill.losses.fused_loss import fused_distillation_loss
from worker.distill.losses.lm_head import Head, TeacherRows
from worker.distill.students.recipe import StudentRecipe, load_student, plan_student
from worker.distill.training.devices import (
    GIB,
    Device,
    Needs,
    Placement,
    find_device,
    needs_by_tokens,
    place,
    place_alone,
    place_largest,
    planned_config,
    teacher_dtypes,
)
from worker.models.architectures import read_config

BILLION = 10**9
NEW_CARD = Device("cuda", "a card", 80 * GIB, has_bfloat16=True)  # of which 72 are planned with
OLD_CARD = Device("cuda", "an old card", 16 * GIB)  # 14.4
# Llama 3.2 1B, and Llama 3.1 with as many layers as give 7 billion parameters
SMALL = LlamaConfig(
    vocab_size=128_256,
    hidden_size=2_048,
    intermediate_size=8_192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=True,
)
LARGE = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4_096,
    intermediate_size=14_336,
    num_hidden_layers=26,
    num_attention_heads=32,
    num_key_value_heads=8,
)


def needs(student_gib: float, teacher_billions: float, *, can_cache: bool = True) -> Needs:
    return Needs(int(student_gib * GIB), int(teacher_billions * BILLION), 0, can_cache)


@pytest.mark.parametrize(
    ("device", "wanted", "teacher"),
    [
        pytest.param(Device(), needs(1, 1), ("cpu", torch.float32, False), id="no card"),
        pytest.param(NEW_CARD, needs(10, 7), ("cuda", torch.bfloat16, False), id="beside"),
        pytest.param(NEW_CARD, needs(65, 7), ("cuda", torch.bfloat16, True), id="alone first"),
        pytest.param(
            NEW_CARD,
            needs(65, 7, can_cache=False),
            ("cpu", torch.float32, False),
            id="no room on disk",
        ),
        pytest.param(NEW_CARD, needs(10, 70), ("cpu", torch.float32, False), id="not even alone"),
        pytest.param(OLD_CARD, needs(4, 1), ("cuda", torch.float32, False), id="old: beside"),
        pytest.param(OLD_CARD, needs(12, 3), ("cuda", torch.float32, True), id="old: alone first"),
        pytest.param(
            OLD_CARD, needs(4, 5), ("cuda", torch.float16, False), id="old: beside in half"
        ),
        pytest.param(
            OLD_CARD, needs(12, 7), ("cuda", torch.float16, True), id="old: alone in half"
        ),
        pytest.param(
            OLD_CARD,
            needs(12, 3, can_cache=False),
            ("cpu", torch.float32, False),
            id="old: live on CPU",
        ),
        pytest.param(OLD_CARD, needs(4, 10), ("cpu", torch.float32, False), id="old: on the CPU"),
    ],
)
def test_the_teacher_goes_where_it_fits(
    device: Device, wanted: Needs, teacher: tuple[str, torch.dtype, bool]
) -> None:
    placed = place(device, wanted)
    assert (placed.teacher_device, placed.teacher_dtype, placed.is_teacher_first) == teacher
    assert placed.device == device


def test_only_a_new_card_trains_under_autocast() -> None:
    assert [device.autocast for device in (Device(), OLD_CARD, NEW_CARD)] == [
        None,
        None,
        torch.bfloat16,
    ]
    assert NEW_CARD.matmul_dtype == torch.float32  # autocast does it there


def test_a_student_that_is_too_large_by_estimate_is_said_to_be() -> None:
    placed = place(NEW_CARD, needs(100, 7))
    assert placed.is_tight
    assert "the student alone is too large" in placed.message
    beside = Placement(NEW_CARD, "cuda", torch.bfloat16, is_tight=True)  # feature losses
    assert "both models together are too large" in beside.message


def test_the_message_names_card_floats_and_place() -> None:
    assert place(Device(), needs(1, 1)).message == ""
    said = place(NEW_CARD, needs(65, 7)).message
    assert said == (
        "device: a card (80.0 GiB free); student in float32 weights under bfloat16 autocast; teacher in bfloat16, "
        "alone before the training, which reads its hidden states from the cache"
    )
    assert "does not fit" in place(OLD_CARD, needs(4, 10)).message


@pytest.mark.parametrize(
    ("wanted", "teacher", "has_checkpointing", "is_tight"),
    [
        pytest.param(
            Needs(60 * GIB, 7 * BILLION, 0, False, 5 * GIB), "cuda", True, False, id="beside"
        ),
        pytest.param(
            Needs(55 * GIB, 7 * BILLION, 0, False, 5 * GIB), "cuda", False, False, id="not needed"
        ),
        pytest.param(
            Needs(60 * GIB, 7 * BILLION, 0, True, 5 * GIB), "cuda", False, False, id="alone first"
        ),
        pytest.param(
            Needs(75 * GIB, 7 * BILLION, 0, True, 5 * GIB),
            "cuda",
            True,
            False,
            id="alone first too",
        ),
        pytest.param(
            Needs(75 * GIB, 7 * BILLION, 0, False, 5 * GIB), "cpu", True, False, id="on the CPU"
        ),
        pytest.param(
            Needs(90 * GIB, 7 * BILLION, 0, False, 5 * GIB), "cpu", True, True, id="too large"
        ),
    ],
)
def test_activation_checkpointing_is_used_if_models_do_not_fit_otherwise(
    wanted: Needs, teacher: str, *, has_checkpointing: bool, is_tight: bool
) -> None:
    placed = place(NEW_CARD, wanted)
    assert (placed.teacher_device, placed.has_checkpointing, placed.is_tight) == (
        teacher,
        has_checkpointing,
        is_tight,
    )
    assert ("activation checkpointing" in placed.message) == has_checkpointing


@pytest.mark.parametrize(
    ("card_gib", "batch_tokens", "expected"),
    [
        pytest.param(80, 16_384, {"has_checkpointing": False}, id="80 GiB"),
        pytest.param(80, 32_768, {"has_checkpointing": True}, id="80 GiB, large batch"),
        # weights, gradients and moments of the student alone take 22 GB
        pytest.param(
            24,
            1_024,
            {"has_checkpointing": True, "is_teacher_first": True},
            id="24 GiB",
        ),
    ],
)
def test_a_teacher_of_7b_and_a_student_of_1b(
    card_gib: int, batch_tokens: int, expected: dict[str, bool]
) -> None:
    card = Device("cuda", "a card", card_gib * GIB, has_bfloat16=True)
    folder = Path("unused")
    recipe = StudentRecipe(Student(init="checkpoint", freeze_head=False), folder, folder, 16)
    found = needs_by_tokens(card, recipe, SMALL, LARGE)(batch_tokens, False)
    if card_gib == 80:  # the order of compromises prefers a cache to recomputation
        found = replace(found, can_cache=False)
    placed = Placement(card, "cuda", torch.bfloat16)
    assert place(card, found) == replace(placed, **expected)  # type: ignore[arg-type]  # all are booleans


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_without_a_card_the_device_is_the_cpu(
    monkeypatch: pytest.MonkeyPatch, *, has_bfloat16: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("HAS_FAST_BFLOAT16", "TRAINS_IN_BFLOAT16"):
        monkeypatch.setattr(f"worker.distill.training.devices.{name}", has_bfloat16)
    found = find_device()
    assert found == Device(has_bfloat16=has_bfloat16, decodes_in_bfloat16=has_bfloat16)
    # what a processor cannot do is not asked of it
    assert found == find_device(precision="bfloat16")
    assert found.autocast is None
    assert found.matmul_dtype == (torch.bfloat16 if has_bfloat16 else torch.float32)
    assert bool(place(found, needs(1, 1)).message) == has_bfloat16
    assert find_device(precision="float32") == Device() == Placement().device
    assert Device().matmul_dtype == torch.float32


def test_bfloat16_that_is_no_faster_is_only_used_on_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on Intel CPUs with AVX-512 BF16 and without AMX."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("worker.distill.training.devices.HAS_FAST_BFLOAT16", True)
    monkeypatch.setattr("worker.distill.training.devices.TRAINS_IN_BFLOAT16", False)
    found = find_device()
    assert (found.matmul_dtype, found.decoding_dtype) == (torch.float32, torch.bfloat16)
    assert place(found, needs(1, 1)).message.endswith("answers are generated with bfloat16 weights")
    assert find_device(precision="float32") == Device()
    both = Device(has_bfloat16=True, decodes_in_bfloat16=True)
    assert find_device(precision="bfloat16") == both
    # a resumed run trains as before, and generates text as every run does
    assert find_device(resumed="bfloat16") == both
    assert find_device(resumed="float32") == found
    assert find_device(precision="float32", resumed="bfloat16") == Device()


def test_a_students_bytes_are_its_parameters_and_what_training_adds(tiny_gpt2_dir: Path) -> None:
    config = read_config(tiny_gpt2_dir)
    layers = Student(init="layers", num_layers=2, freeze_head=False)
    recipe = plan_student(tiny_gpt2_dir, tiny_gpt2_dir, layers)
    found = needs_by_tokens(Device("cuda"), recipe, config, config)(100, False)
    student, width, num_tokens = recipe.build(), config.hidden_size, config.vocab_size
    num_parameters = sum(p.numel() for p in student.parameters())
    head = 4 * num_tokens * width
    # weights and moments, and the teacher's head for the loss
    resident = 12 * num_parameters + head
    # Per layer: inputs and results of two norms, joined projections, the attention's result, and the
    # five results that this GELU keeps. After the layers: a norm, and the rows of the targets.
    activations = 100 * 4 * width * (2 * (4 + 3 + 1 + 5 * 4) + 4)
    chunks = 8 * 4 * 100 * num_tokens
    assert found.student_bytes == resident + activations + head + max(chunks, head)
    assert found.teacher_bytes(torch.bfloat16) < found.teacher_bytes(torch.float32)


def test_what_is_frozen_needs_no_moments(tiny_llama_dir: Path) -> None:
    config = read_config(tiny_llama_dir)
    trained, frozen, lora = (
        needs_by_tokens(
            device, plan_student(tiny_llama_dir, tiny_llama_dir, student), config, config
        )(100, False).student_bytes
        for device, student in [
            (Device("cuda"), Student(init="checkpoint", freeze_head=False)),
            (Device("cuda"), Student(init="checkpoint", freeze_head=True)),
            (Device("cuda"), Student(init="lora", lora=Lora(rank=1))),
        ]
    )
    assert lora < frozen < trained


def test_weights_with_adapters_need_two_bytes_under_autocast(tiny_llama_dir: Path) -> None:
    config = read_config(tiny_llama_dir)
    recipe = plan_student(tiny_llama_dir, tiny_llama_dir, Student(init="lora"))
    new, old = (
        needs_by_tokens(card, recipe, config, config)(0, False).student_bytes
        for card in (NEW_CARD, OLD_CARD)
    )
    student = load_student(recipe, None, seed=0, frozen_dtype=torch.bfloat16)
    lowered = sum(p.numel() for p in student.parameters() if p.dtype == torch.bfloat16)
    # the estimate counts the norms, too, which are in float32
    assert 2 * lowered <= old - new <= 2.1 * lowered


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart", "encoder-decoder"])
def test_the_planned_configuration_is_the_built_students(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / family, family)
    kinds = [Student(init="checkpoint"), Student(init="layers", num_layers=2)]
    if family in ("llama", "gpt2", "t5"):
        kinds.append(Student(init="width", intermediate_size=32, num_layers=3))
    for student in kinds:
        recipe = plan_student(folder, folder, student)
        planned, built = planned_config(recipe, read_config(folder)), recipe.build()
        bare = needs_by_tokens(Device("cuda"), recipe, read_config(folder), planned)(1, False)
        assert bare.num_teacher_parameters == sum(p.numel() for p in built.parameters())


def micro_tokens_on(
    gib: int, most_tokens: int = 8_192, *, has_teacher: bool = True
) -> tuple[int | None, bool, bool]:
    """Micro-batch and compromises that are chosen for a pair of 7B and 1B."""
    card = Device("cuda", "a card", gib * GIB, has_bfloat16=True)
    folder = Path("unused")
    recipe = StudentRecipe(Student(init="checkpoint", freeze_head=False), folder, folder, 16)
    needs_of = needs_by_tokens(card, recipe, SMALL, LARGE, can_cache=False)
    where = place if has_teacher else place_alone
    placed = place_largest(lambda tokens: where(card, needs_of(tokens, True)), most_tokens)
    return placed.micro_tokens, placed.has_checkpointing, placed.is_tight


def test_a_larger_card_takes_larger_micro_batches() -> None:
    assert micro_tokens_on(80) == (8_192, False, False)
    assert micro_tokens_on(52) == (4_096, False, False)
    assert micro_tokens_on(52, has_teacher=False) == (8_192, False, False)


def test_a_requested_batch_is_divided_only_if_that_is_faster() -> None:
    assert micro_tokens_on(80, 10_000) == (10_000, False, False)
    assert micro_tokens_on(80, 30_000) == (8_192, False, False)  # else with checkpointing
    assert micro_tokens_on(80, 300) == (300, False, False)


def test_activations_are_recomputed_only_if_no_full_batch_fits_without() -> None:
    assert micro_tokens_on(46) == (1_024, False, False)
    assert micro_tokens_on(44) == (8_192, True, False)


def test_a_card_that_may_be_too_small_takes_the_smallest_micro_batches() -> None:
    assert micro_tokens_on(24) == (256, True, True)


def test_the_message_names_the_chosen_micro_batch() -> None:
    placed = Placement(NEW_CARD, "cuda", torch.bfloat16, micro_tokens=8_192)
    assert "micro-batches of at most 8,192 tokens" in placed.message


def test_autocast_lowers_a_body_only_where_asked() -> None:
    layer, x = torch.nn.Linear(4, 4), torch.ones(1, 4)
    with autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with autocast("cpu", None):
        assert layer(x).dtype == torch.float32


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "tvd"])
def test_the_loss_and_its_gradient_are_the_same_under_autocast(divergence: DivergenceName) -> None:
    torch.manual_seed(0)
    head = Head(torch.randn(50, 16, requires_grad=True))
    teacher = TeacherRows(Head(torch.randn(50, 16)), hidden_NH=torch.randn(9, 16))
    hidden_NH, targets_N = torch.randn(9, 16, requires_grad=True), torch.arange(9)
    objective = TokenObjective.from_objective(Objective(divergence=divergence))
    found = []
    for dtype in (None, torch.bfloat16):
        with autocast("cpu", dtype):
            loss, _ = fused_distillation_loss(
                hidden_NH, head, targets_N, teacher, objective, denominator=9
            )
        found.append([loss, *torch.autograd.grad(loss, [hidden_NH, head.weight_VH])])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_quantised_teacher_fits_where_the_full_one_does_not() -> None:
    full = replace(needs(10, 60, can_cache=False), num_quantizable=55 * BILLION)
    assert place(NEW_CARD, full).teacher_device == "cpu"
    placed = place(NEW_CARD, replace(full, precision="int4"))
    assert (placed.teacher_device, placed.teacher_precision) == ("cuda", "int4")
    assert "teacher in int4, beside the student" in placed.message
    # layer fitting loads the start model, which is not quantised
    assert placed.beside_student == ("cpu", torch.float32)
    small = replace(needs(10, 7), num_quantizable=6 * BILLION, precision="int8")
    assert place(NEW_CARD, small).beside_student == ("cuda", torch.bfloat16)


@pytest.mark.parametrize(
    ("precision", "dtypes"),
    [
        ("auto", (torch.float32, torch.float16)),
        ("int8", (torch.float32, torch.float16)),
        ("int4", (torch.bfloat16,)),
        ("fp8", (torch.bfloat16,)),
    ],
)
def test_kernels_for_int4_and_fp8_compute_in_bfloat16(
    precision: TeacherPrecision | Auto, dtypes: tuple[torch.dtype, ...]
) -> None:
    assert teacher_dtypes(OLD_CARD, precision) == dtypes
    assert teacher_dtypes(NEW_CARD, precision) == (torch.bfloat16,)


def test_a_quantised_teacher_on_a_cpu_is_named() -> None:
    placed = place(Device(), replace(needs(1, 1), precision="int8"))
    assert placed.message == "device: CPU; student with float32 matmuls; teacher in int8"
