from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from app.contracts.distillation import Student
from tests.worker.distill.students.test_layer_dropping import logits, random_model
from worker.distill.students.layer_dropping import is_tied
from worker.distill.students.recipe import load_model, num_parameters, plan_student
from worker.distill.students.width_pruning import (
    Sizes,
    full_sizes,
    narrow_config,
    sizes_of,
    slice_width,
)
from worker.errors import InvalidStudent, UnsupportedModel

NAMES = (
    "llama",
    "llama-tied",
    "mistral",
    "qwen2",
    "qwen3-sliding",
    "smollm3",
    "gpt2",
    "t5",
    "t5-1.1",
)
# enough tokens that no other neuron keeps silent on them by chance
CALIBRATION = tuple(
    tuple((first + (first + 5) * i) % 93 + 3 for i in range(40)) for first in range(24)
)
# those kept, of 32
CHANNELS = torch.tensor([0, 3, 5, 6, 8, 9, 12, 15, 17, 18, 20, 22, 25, 27, 30, 31])
NEURONS = 40  # kept; the ones before lose their output
FULL = 48


def narrower(name: str) -> Sizes:
    if name == "gpt2":
        return Sizes(hidden_size=16, num_heads=2, num_kv_heads=2, intermediate_size=NEURONS)
    num_kv_heads = 2 if name.startswith("t5") else 1
    return Sizes(hidden_size=16, num_heads=2, num_kv_heads=num_kv_heads, intermediate_size=NEURONS)


def features(heads: Tensor, width: int = 8) -> Tensor:
    return (heads[:, None] * width + torch.arange(width)).flatten()


def other_than(kept: Tensor, number: int) -> Tensor:
    return torch.tensor([i for i in range(number) if i not in kept])


LOST = other_than(CHANNELS, 32)
LOST_HEADS = torch.tensor([0, 1])  # of 4; in Llama-like models the first of two groups


@torch.no_grad()
def doctored(name: str) -> PreTrainedModel:
    """A model half of whose channels and heads, and some of whose neurons, have nothing to say."""
    model = random_model(name)
    weights = model.state_dict()
    for key, tensor in weights.items():
        kind = key.split(".")[-2:]
        writes = (
            any(part in key for part in ("o_proj", "down_proj", ".o.", ".wo."))
            and kind[-1] == "weight"
        )
        if any(part in key for part in ("embed_tokens", "shared", "wte", "wpe")):
            tensor[:, LOST] = 0.0
        elif writes:
            tensor[LOST] = 0.0
        elif "v_proj" in key:
            tensor[features(LOST_HEADS[:1])] = 0.0  # one of two heads of keys and values
        elif kind[-2] == "v":
            tensor[features(LOST_HEADS)] = 0.0
        elif "up_proj" in key or kind[-2] in ("wi", "wi_1"):
            tensor[: FULL - NEURONS] = 0.0
    if name == "gpt2":
        doctor_gpt2(weights)
    return model


def doctor_gpt2(weights: dict[str, Tensor]) -> None:
    """What is left of the residual stream has mean zero, so that the norms do not miss what was lost."""
    for key, tensor in weights.items():
        if "ln_" in key and key.endswith("bias"):
            tensor[LOST] = 0.0
        elif "c_proj" in key or "wte" in key or "wpe" in key:
            tensor[..., LOST] = 0.0
            tensor[..., CHANNELS] -= tensor[..., CHANNELS].mean(dim=-1, keepdim=True)
        elif "c_attn" in key:
            tensor[..., 64 + features(LOST_HEADS)] = 0.0
        elif "c_fc" in key:
            tensor[..., : tensor.shape[-1] - NEURONS] = 0.0


@pytest.mark.parametrize("calibration", [(), CALIBRATION], ids=["weights", "activations"])
@pytest.mark.parametrize("name", NAMES)
def test_a_student_of_full_width_is_its_start(name: str, calibration: Any) -> None:
    model = random_model(name)
    student = slice_width(model, full_sizes(model.config), calibration)
    torch.testing.assert_close(logits(student), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_parts_that_say_nothing_are_those_left_out(name: str) -> None:
    model = doctored(name)
    student = slice_width(model, narrower(name), CALIBRATION)
    assert full_sizes(student.config) == narrower(name)
    # the norms' epsilon weighs more where they see fewer channels
    torch.testing.assert_close(logits(student), logits(model), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_student_loads_as_it_was(name: str, tmp_path: Path) -> None:
    student = slice_width(random_model(name), narrower(name))
    student.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert is_tied(loaded) == is_tied(student)
    torch.testing.assert_close(logits(loaded), logits(student), rtol=0, atol=0)


@pytest.mark.parametrize("calibration", [(), CALIBRATION], ids=["weights", "activations"])
@pytest.mark.parametrize("name", NAMES)
def test_a_start_in_bfloat16_gives_the_student_of_the_same_start_in_float32(
    name: str, calibration: Any, tmp_path: Path
) -> None:
    random_model(name).to(torch.bfloat16).save_pretrained(tmp_path)
    one, other = (
        slice_width(load_model(tmp_path, dtype), narrower(name), calibration).state_dict()
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, other[key])


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_measuring_leaves_the_model_as_it_was(name: str) -> None:
    model = random_model(name)
    before = logits(model)
    slice_width(model, narrower(name), CALIBRATION)
    assert torch.equal(logits(model), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_without_sequences_the_weights_decide() -> None:
    model = random_model("llama")
    for layer in model.base_model.layers:
        layer.mlp.down_proj.weight[:, : FULL - NEURONS] = 0.0
    student = slice_width(model, Sizes(32, 4, 2, NEURONS))
    torch.testing.assert_close(logits(student), logits(model), rtol=1e-5, atol=1e-5)


def test_a_group_of_heads_keeps_its_keys_and_values() -> None:
    config = random_model("llama").config  # 4 heads, 2 of keys and values
    found = {
        heads: sizes_of(Student(init="width", num_heads=heads), config).num_kv_heads
        for heads in (2, 4)
    }
    assert found == {2: 1, 4: 2}


def test_heads_that_do_not_share_their_keys_are_refused() -> None:
    config = random_model("llama").config
    with pytest.raises(InvalidStudent, match="to a multiple of 2"):
        sizes_of(Student(init="width", num_heads=3), config)


def test_the_hidden_size_of_a_gpt2_goes_with_its_heads() -> None:
    config = random_model("gpt2").config
    assert sizes_of(Student(init="width", hidden_size=16), config).num_heads == 2
    assert sizes_of(Student(init="width", num_heads=3), config).hidden_size == 24
    with pytest.raises(InvalidStudent, match="set it to 16"):
        sizes_of(Student(init="width", hidden_size=20), config)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (Sizes(64, 4, 2, 48), "student.hidden_size is 64.*has 32"),
        (Sizes(30, 4, 2, 48), "not a multiple of the number of attention heads"),
    ],
)
def test_impossible_widths_are_refused(sizes: Sizes, message: str) -> None:
    with pytest.raises(InvalidStudent, match=message):
        narrow_config(random_model("llama").config, sizes)


def test_a_family_whose_parts_are_unknown_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"bloom.*use init=layers"):
        sizes_of(Student(init="width", hidden_size=16), random_model("bloom").config)


def test_a_recipe_builds_the_same_narrow_student_each_time(tiny_llama_dir: Path) -> None:
    narrow = Student(init="width", hidden_size=32, intermediate_size=96)
    recipe = plan_student(tiny_llama_dir, tiny_llama_dir, narrow, calibration=CALIBRATION)
    one, other = recipe.build(), recipe.build()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert num_parameters(one) < num_parameters(load_model(tiny_llama_dir))
    assert not recipe.freeze_head


def test_a_head_that_was_copied_whole_may_be_frozen(tiny_llama_dir: Path) -> None:
    narrow = Student(init="width", intermediate_size=96)
    assert plan_student(tiny_llama_dir, tiny_llama_dir, narrow).freeze_head


def test_an_impossible_width_is_refused_before_anything_is_loaded(tiny_llama_dir: Path) -> None:
    with pytest.raises(InvalidStudent, match="lower it"):
        plan_student(tiny_llama_dir, tiny_llama_dir, Student(init="width", hidden_size=128))


def test_a_student_may_lose_layers_and_width(tiny_llama_dir: Path) -> None:
    both = Student(init="width", num_layers=2, hidden_size=32)
    recipe = plan_student(tiny_llama_dir, tiny_llama_dir, both)
    assert recipe.layers == (0, 3)
    student = recipe.build()
    assert (student.config.num_hidden_layers, student.config.hidden_size) == (2, 32)
