from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from tests.worker.memory_sink import MemorySink
from worker.cpu import HAS_FAST_BFLOAT16
from worker.distill.model_pair import ModelPair
from worker.distill.pipeline import distil
from worker.distill.training.devices import GIB, Device, Placement
from worker.protocol.run_spec import RunSpec
from worker.train import EngineSampler

MakeSpec = Callable[..., RunSpec]
CARD = Device("cuda", "a card", 80 * GIB, has_bfloat16=True)


@pytest.fixture
def pair(make_spec: MakeSpec) -> ModelPair:
    """A pair on a machine with a card, for which the meta device stands."""
    pair = ModelPair(make_spec(), "cuda", card=CARD)
    vars(pair)["placement"] = Placement(CARD, "meta", torch.bfloat16)
    return pair


def test_the_evaluated_teacher_is_where_the_placement_says(pair: ModelPair) -> None:
    teacher = pair.load_evaluated_teacher()
    assert {(p.device.type, p.dtype) for p in teacher.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.skipif(not HAS_FAST_BFLOAT16, reason="the CPU has no bfloat16 instructions")
def test_on_a_cpu_the_teacher_answers_with_the_weights_of_a_served_model(
    make_spec: MakeSpec,
) -> None:
    pair = ModelPair(make_spec(), "cpu", card=Device(decodes_in_bfloat16=True))

    def packed_dtypes(teacher: PreTrainedModel) -> set[torch.dtype]:
        head = teacher.get_output_embeddings()
        layers = (m for m in teacher.modules() if hasattr(m, "packed") and m is not head)
        return {layer.packed.dtype for layer in layers}

    assert packed_dtypes(pair.load_answering_teacher()) == {torch.bfloat16}
    assert packed_dtypes(pair.load_teacher()) == {torch.float32}


def test_a_card_holds_one_copy_of_the_teacher(pair: ModelPair) -> None:
    teaching = pair.load_teacher()
    assert pair.load_evaluated_teacher() is teaching


def test_the_student_of_a_card_is_evaluated_and_saved_in_bfloat16(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU stands for the card: it has the same autocast."""
    monkeypatch.setattr(Device, "autocast", torch.bfloat16)
    result = distil(
        make_spec(n_epochs=1), tmp_path / "out", MemorySink(), EngineSampler, lambda: False
    ).result
    student = result["student"]
    assert student["weights_bytes"] == 2 * student["num_parameters"]
    saved = load_file(tmp_path / "out" / "student" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    for path in (tmp_path / "out").glob("step-*/model/model.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}


def test_the_evaluation_takes_the_teacher_in_the_dtype_of_the_placement(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def place(pair: ModelPair, *, can_cache: bool) -> Placement:
        return Placement(pair.card, teacher_dtype=torch.bfloat16)

    monkeypatch.setattr(ModelPair, "_place", place)
    result = distil(
        make_spec(n_epochs=1), tmp_path / "out", MemorySink(), EngineSampler, lambda: False
    ).result
    assert result["teacher"]["weights_bytes"] == 2 * result["teacher"]["num_parameters"]
    assert result["teacher"]["kl"] < 0.01


@pytest.mark.parametrize(
    ("batch_tokens", "block", "expected"),
    [
        ("auto", {}, 8_192),
        (300, {}, 300),
        ("auto", {"data": {"completions": "student"}}, 8_192),
    ],
)
def test_a_card_with_room_takes_large_micro_batches(
    make_spec: MakeSpec, batch_tokens: object, block: dict[str, object], expected: int
) -> None:
    pair = ModelPair(make_spec(block, batch_tokens=batch_tokens), "cuda", card=CARD)
    assert pair.placement.micro_tokens == pair.micro_tokens == expected
    assert ModelPair(pair.spec, "cpu").placement.micro_tokens is None
