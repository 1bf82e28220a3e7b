"""Sizes that are read from headers are those of the models that a run builds."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from app.contracts.distillation import Student
from app.contracts.model_sizes import ModelSizes, measure_model, num_trained, student_sizes
from tests.tiny import tiny_tokenizer
from worker.distill.run_costs import measure_folder
from worker.distill.students.fresh import build_fresh, fresh_config
from worker.distill.students.lora import add_lora
from worker.distill.students.recipe import (
    freeze_encoder,
    freeze_head,
    load_model,
    num_parameters,
    plan_student,
)
from worker.models.architectures import layer_counts

FAMILIES = ("llama", "gpt2", "bloom", "opt", "gpt_neox", "t5", "bart", "bert", "bert2bert")


@pytest.fixture
def folder_of(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """A function that returns the folder of a tiny model."""
    return lambda family: Path(request.getfixturevalue(f"tiny_{family}_dir"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_header_gives_the_sizes_of_the_model(
    folder_of: Callable[[str], Path], family: str
) -> None:
    folder = folder_of(family)
    model, sizes = load_model(folder), measure_folder(folder)
    head = model.get_output_embeddings().weight
    assert sizes.num_parameters == num_parameters(model)
    assert sizes.num_layers == sum(layer_counts(model.config))
    assert (sizes.hidden_size, sizes.head_parameters) == (head.shape[1], head.numel())


STUDENTS = {
    "layers": ("llama", {"num_layers": 2}),
    "layers of a decoder": ("t5", {"num_layers": 1, "num_encoder_layers": 2}),
    "whole encoder": ("bart", {"num_decoder_layers": 1}),
    "width": (
        "llama", {"init": "width", "hidden_size": 32, "num_heads": 2, "intermediate_size": 64}
    ),
    "checkpoint": ("gpt2", {"init": "checkpoint", "freeze_head": False}),
    "lora": ("llama", {"init": "lora", "lora": {"rank": 4}}),
}  # fmt: skip


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_has_the_sizes_of_the_built_one(
    folder_of: Callable[[str], Path], name: str
) -> None:
    family, block = STUDENTS[name]
    folder, student = folder_of(family), Student.model_validate(block)
    recipe = plan_student(folder, folder, student)
    model = recipe.build()
    num_built = num_parameters(model)
    if recipe.lora is not None:
        add_lora(model, recipe.lora, seed=0)
    if recipe.freeze_head:
        freeze_head(model)
    if recipe.freeze_encoder:
        freeze_encoder(model)
    settled = student.model_copy(
        update={"freeze_head": recipe.freeze_head, "freeze_encoder": recipe.freeze_encoder}
    )
    sizes = student_sizes(settled, measure_folder(folder))
    built_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # key-value heads, biases and embeddings that parts share are approximated
    assert sizes.num_parameters == pytest.approx(num_built, rel=0.05)
    assert num_trained(settled, sizes) == pytest.approx(built_trained, rel=0.12)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom", "t5", "encoder-decoder"])
def test_a_fresh_student_has_the_sizes_of_its_config(family: str) -> None:
    block = {"family": family, "hidden_size": 64, "num_layers": 2, "max_positions": 64}
    student = Student.model_validate({"init": "fresh", "config": block})
    tokenizer = tiny_tokenizer("roberta")
    assert student.config is not None
    model = build_fresh(fresh_config(student.config, tokenizer), seed=0)
    owner = measure_model(
        {"embed.weight": (len(tokenizer), 8), "layers.0.w": (8, 8)}, json.loads("{}")
    )
    assert student_sizes(student, owner).num_parameters == pytest.approx(
        num_parameters(model), rel=0.1
    )


def test_a_second_copy_of_a_tied_head_counts_once() -> None:
    shapes = {
        "model.embed_tokens.weight": (100, 8),
        "model.layers.0.mlp.up_proj.weight": (16, 8),
        "lm_head.weight": (100, 8),
    }
    tied, untied = (
        measure_model(shapes, {"tie_word_embeddings": is_tied}) for is_tied in (True, False)
    )
    assert (tied.num_parameters, tied.is_tied) == (800 + 128, True)
    assert (untied.num_parameters, untied.is_tied) == (1600 + 128, False)


def test_tensors_without_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="no layers"):
        measure_model({"embed.weight": (10, 4)}, {})


def test_a_ladder_has_the_sizes_of_each_student(tiny_llama_dir: Path) -> None:
    student = Student(num_layers=(1, 3))
    start: ModelSizes = measure_folder(tiny_llama_dir)
    found = [student_sizes(student, start, size).num_layers for size in student.ladder]
    assert found == [1, 3]
