from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPTJConfig

from app.contracts.distillation import FreshConfig, Lora, Student
from tests.tiny import save_tiny
from worker.distill.students.recipe import (
    freeze_encoder,
    freeze_head,
    load_model,
    num_parameters,
    plan_student,
)
from worker.errors import InvalidStudent, StudentTooDeep, UnsupportedModel
from worker.models.architectures import layer_counts


def test_half_of_the_layers_are_kept_by_default(tiny_llama_dir: Path) -> None:
    recipe = plan_student(tiny_llama_dir, tiny_llama_dir, Student())
    assert recipe.layers == (0, 3)
    assert recipe.num_available == 4
    assert num_parameters(recipe.build()) < num_parameters(load_model(tiny_llama_dir))


def test_the_given_layers_are_kept(tiny_gpt2_dir: Path) -> None:
    recipe = plan_student(tiny_gpt2_dir, tiny_gpt2_dir, Student(layers=(1, 2, 3)))
    teacher, student = load_model(tiny_gpt2_dir).state_dict(), recipe.build().state_dict()
    for number, layer in enumerate((1, 2, 3)):
        name = "transformer.h.{}.mlp.c_fc.weight"
        assert torch.equal(student[name.format(number)], teacher[name.format(layer)])


def test_a_rung_of_a_ladder_decides_how_many_are_kept(tiny_llama_dir: Path) -> None:
    ladder = Student(num_layers=(1, 3))
    kept = [plan_student(tiny_llama_dir, tiny_llama_dir, ladder, n).layers for n in ladder.ladder]
    assert kept == [(0,), (0, 1, 3)]


@pytest.mark.parametrize("student", [Student(num_layers=5), Student(layers=(0, 4))])
def test_more_layers_than_there_are_are_refused(tiny_llama_dir: Path, student: Student) -> None:
    with pytest.raises(StudentTooDeep, match="ask for fewer"):
        plan_student(tiny_llama_dir, tiny_llama_dir, student)


@pytest.mark.parametrize("family", ["t5", "bart", "bert2bert"])
def test_an_encoder_decoder_keeps_its_encoder_and_half_of_its_decoder(
    request: pytest.FixtureRequest, family: str
) -> None:
    folder = request.getfixturevalue(f"tiny_{family}_dir")
    recipe = plan_student(folder, folder, Student())
    assert (recipe.layers, recipe.encoder_layers) == ((0, 3), None)
    assert recipe.freeze_encoder
    assert layer_counts(recipe.build().config) == (4, 2)


def test_an_encoder_that_lost_layers_is_trained(tiny_t5_dir: Path) -> None:
    student = Student(num_encoder_layers=3, num_decoder_layers=1)
    recipe = plan_student(tiny_t5_dir, tiny_t5_dir, student)
    assert (recipe.layers, recipe.encoder_layers) == ((0,), (0, 1, 3))
    assert not recipe.freeze_encoder
    assert layer_counts(recipe.build().config) == (3, 1)


def test_encoder_layers_of_a_causal_model_are_refused(tiny_gpt2_dir: Path) -> None:
    with pytest.raises(InvalidStudent, match=r"give student\.num_layers"):
        plan_student(tiny_gpt2_dir, tiny_gpt2_dir, Student(num_encoder_layers=1))


def test_two_numbers_of_decoder_layers_are_refused(tiny_t5_dir: Path) -> None:
    with pytest.raises(InvalidStudent, match="give one"):
        plan_student(tiny_t5_dir, tiny_t5_dir, Student(num_layers=2, num_decoder_layers=3))


def test_a_masked_model_is_no_start(tiny_bert_dir: Path) -> None:
    with pytest.raises(InvalidStudent, match=r"student\.init=fresh"):
        plan_student(tiny_bert_dir, tiny_bert_dir, Student(init="checkpoint"))


def test_a_fresh_student_takes_the_teachers_tokenizer(
    tiny_bert_dir: Path, tiny_gpt2_dir: Path
) -> None:
    sizes = FreshConfig(family="t5", hidden_size=32, num_layers=2, num_decoder_layers=1)
    recipe = plan_student(tiny_bert_dir, tiny_gpt2_dir, Student(init="fresh", config=sizes), seed=3)
    assert recipe.tokenizer_dir == tiny_bert_dir
    assert not recipe.freeze_head
    student, again = recipe.build(), recipe.build()
    assert layer_counts(student.config) == (2, 1)
    assert all(
        torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True)
    )


def test_a_lora_student_is_its_start_until_it_is_trained(tiny_llama_dir: Path) -> None:
    recipe = plan_student(tiny_llama_dir, tiny_llama_dir, Student(init="lora"))
    assert recipe.lora == Lora()
    start = load_model(tiny_llama_dir)
    assert all(
        torch.equal(a, b)
        for a, b in zip(recipe.build().parameters(), start.parameters(), strict=True)
    )


def test_a_built_student_has_no_dropout(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "bart", "bart", num_layers=2)
    student: Any = plan_student(folder, folder, Student()).build()
    assert not any(module.training for module in student.modules())


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    GPTJConfig(n_layer=1).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"'gptj'.*llama"):
        load_model(tmp_path)


def test_layers_whose_number_matters_are_refused(tmp_path: Path) -> None:
    GPT2Config(scale_attn_by_inverse_layer_idx=True).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="scale_attn_by_inverse_layer_idx"):
        load_model(tmp_path)


def test_a_frozen_head_takes_the_tied_embedding_with_it(tiny_llama_dir: Path) -> None:
    model = load_model(tiny_llama_dir)
    freeze_head(model)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.embed_tokens.weight"]


def test_a_frozen_encoder_takes_the_shared_embedding_with_it(tiny_t5_dir: Path) -> None:
    model = load_model(tiny_t5_dir)
    freeze_encoder(model)
    trained = {
        name.split(".")[0]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert trained <= {"decoder", "lm_head"}
    assert "decoder" in trained


def test_a_checkpoints_head_is_frozen_only_if_it_is_the_teachers(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    other = load_model(tiny_llama_dir)
    other.save_pretrained(tmp_path / "same")
    with torch.no_grad():
        other.get_output_embeddings().weight.mul_(1.5)
    other.save_pretrained(tmp_path / "changed")
    checkpoint = Student(init="checkpoint")
    assert plan_student(tiny_llama_dir, tmp_path / "same", checkpoint).freeze_head
    assert not plan_student(tiny_llama_dir, tmp_path / "changed", checkpoint).freeze_head


def test_a_checkpoints_encoder_is_frozen_only_if_it_is_the_teachers(
    tiny_t5_dir: Path, tmp_path: Path
) -> None:
    load_model(tiny_t5_dir).save_pretrained(tmp_path)
    checkpoint = Student(init="checkpoint")
    assert plan_student(tiny_t5_dir, tiny_t5_dir, checkpoint).freeze_encoder
    assert not plan_student(tiny_t5_dir, tmp_path, checkpoint).freeze_encoder
