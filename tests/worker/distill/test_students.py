from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from app.distillation import Student
from worker.distill.errors import StudentTooDeep, UnsupportedModel
from worker.distill.students import (
    first_and_last,
    freeze_head,
    keep_layers,
    load_model,
    num_parameters,
    plan_student,
)

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA_LIKE: dict[str, Any] = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
CONFIGS = {
    "llama": lambda: LlamaConfig(**LLAMA_LIKE),
    "llama-tied": lambda: LlamaConfig(**LLAMA_LIKE, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**LLAMA_LIKE),
    "qwen2": lambda: Qwen2Config(**LLAMA_LIKE),
    "qwen3-sliding": lambda: Qwen3Config(
        **LLAMA_LIKE, head_dim=8, use_sliding_window=True, sliding_window=4, max_window_layers=2
    ),
    "smollm3": lambda: SmolLM3Config(**LLAMA_LIKE, no_rope_layer_interval=2),
    "gpt2": lambda: GPT2Config(**SIZES),
}
TOKENS_BT = torch.arange(3, 23).view(2, 10)


def random_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=TOKENS_BT, use_cache=False).logits
    return found


@pytest.mark.parametrize(
    ("num_available", "num_kept", "layers"),
    [(30, 15, (*range(8), *range(23, 30))), (12, 4, (0, 1, 10, 11)), (4, 1, (0,)), (3, 3, (0, 1, 2))],
)
def test_the_first_and_last_halves_are_kept(
    num_available: int, num_kept: int, layers: tuple[int, ...]
) -> None:
    assert first_and_last(num_available, num_kept) == layers


@pytest.mark.parametrize("name", CONFIGS)
def test_keeping_every_layer_changes_nothing(name: str) -> None:
    model = random_model(name)
    torch.testing.assert_close(logits(keep_layers(model, range(4))), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_student_is_the_teacher_without_the_other_layers(name: str) -> None:
    model = random_model(name)
    student = keep_layers(model, (0, 3))
    layers: Any = model.base_model.h if name == "gpt2" else model.base_model.layers
    kept = torch.nn.ModuleList([layers[0], layers[3]])
    setattr(model.base_model, "h" if name == "gpt2" else "layers", kept)
    model.config.num_hidden_layers = 2
    for field in ("layer_types", "no_rope_layers"):
        if getattr(model.config, field, None):
            setattr(model.config, field, [getattr(model.config, field)[i] for i in (0, 3)])
    torch.testing.assert_close(logits(student), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_student_loads_as_it_was(name: str, tmp_path: Path) -> None:
    student = keep_layers(random_model(name), (0, 1, 3))
    student.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config.num_hidden_layers == 3
    torch.testing.assert_close(logits(loaded), logits(student), rtol=0, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_student_generates_with_its_cache_what_it_computes_without(name: str) -> None:
    student = keep_layers(random_model(name), (0, 3))
    mask_BT = torch.ones_like(TOKENS_BT)
    made = [
        student.generate(
            TOKENS_BT, attention_mask=mask_BT, max_new_tokens=8, do_sample=False, use_cache=cached
        )
        for cached in (True, False)
    ]
    assert torch.equal(*made)


def test_half_of_the_layers_are_kept_by_default(tiny_llama_dir: Path) -> None:
    recipe = plan_student(tiny_llama_dir, tiny_llama_dir, Student())
    assert recipe.layers == (0, 3)
    assert num_parameters(recipe.build()) < num_parameters(load_model(tiny_llama_dir))


def test_the_given_layers_are_kept(tiny_gpt2_dir: Path) -> None:
    recipe = plan_student(tiny_gpt2_dir, tiny_gpt2_dir, Student(layers=(1, 2, 3)))
    teacher, student = load_model(tiny_gpt2_dir).state_dict(), recipe.build().state_dict()
    for number, layer in enumerate((1, 2, 3)):
        name = "transformer.h.{}.mlp.c_fc.weight"
        assert torch.equal(student[name.format(number)], teacher[name.format(layer)])


@pytest.mark.parametrize("student", [Student(num_layers=5), Student(layers=(0, 4))])
def test_more_layers_than_there_are_are_refused(tiny_llama_dir: Path, student: Student) -> None:
    with pytest.raises(StudentTooDeep, match="ask for fewer"):
        plan_student(tiny_llama_dir, tiny_llama_dir, student)


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    OPTConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"'opt'.*llama"):
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
