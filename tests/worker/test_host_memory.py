"""Peak memory of the host while models are loaded: by an import, and for the models of a run.

All measurements are made in this process. Weights are too large for the heap of the C library, so
their memory is returned to the system at once. Pages of mapped files count as resident.
"""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from app.contracts.distillation import Lora, Student
from bench.gpu.memory import peak_bytes, reset_peak
from tests.adapters import save_adapted
from tests.tiny import tiny_tokenizer
from tests.worker.memory_sink import MemorySink
from worker.distill.students.lora import add_lora
from worker.distill.students.recipe import load_model, load_student, num_parameters, plan_student
from worker.import_model import import_model
from worker.models.adapters import merge_adapters
from worker.protocol.import_spec import ImportSpec

SPARE_BYTES = 24 * 2**20  # for activations and fragmentation
Task = Callable[[Path], object]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models of 4 layers in bfloat16: `large` has about 100 MB, `tiny` almost none.

    The weights of `large` are in several files, none of which has half of them.
    """
    found, tokenizer = tmp_path_factory.mktemp("memory"), tiny_tokenizer()
    for name, width in (("large", 1024), ("tiny", 64)):
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(found / name, max_shard_size="40MB")
        tokenizer.save_pretrained(found / name)
    return found


def added_bytes(task: Task, folder: Path) -> int:
    """Returns the most memory that a task with the large model has added.

    The task first runs with the tiny model, so that what is imported on first use does not count.
    """
    task(folder / "tiny")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # otherwise weights could use free memory that is resident
    reset_peak("cpu")
    before = peak_bytes("cpu")
    result = task(folder / "large")
    added = peak_bytes("cpu") - before
    del result
    return added


def stored_bytes(model: Path) -> int:
    return sum(path.stat().st_size for path in model.glob("*.safetensors"))


def test_an_import_holds_one_copy_of_the_weights(folder: Path, tmp_path: Path) -> None:
    def convert(model: Path) -> None:
        spec = ImportSpec(format="folder", source_path=model)
        import_model(spec, tmp_path / model.name, MemorySink())

    large = folder / "large"
    assert added_bytes(convert, folder) < 1.2 * stored_bytes(large) + SPARE_BYTES
    theirs: dict[str, torch.Tensor] = {}
    for path in large.glob("*.safetensors"):
        theirs |= load_file(path)
    ours = load_file(tmp_path / "large" / "model" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_teacher_in_bfloat16_needs_its_weights_once(folder: Path) -> None:
    added = added_bytes(lambda model: load_model(model, torch.bfloat16), folder)
    assert added < 1.2 * stored_bytes(folder / "large") + SPARE_BYTES


def test_a_student_needs_only_its_own_weights_beside_its_mapped_start(folder: Path) -> None:
    def build(model: Path) -> object:
        return plan_student(model, model, Student(num_layers=1)).build()

    start_bytes = stored_bytes(folder / "large")
    student_bytes = 2 * start_bytes / 4  # in float32, one of four layers
    assert added_bytes(build, folder) < start_bytes + 1.2 * student_bytes + SPARE_BYTES


def test_a_narrower_student_needs_only_its_own_weights_beside_its_mapped_start(
    folder: Path,
) -> None:
    def build(model: Path) -> PreTrainedModel:
        width = 64 if model.name == "tiny" else 512
        student = Student(init="width", hidden_size=width, intermediate_size=3 * width)
        return plan_student(model, model, student, calibration=((5,) * 32,)).build()

    start_bytes = stored_bytes(folder / "large")
    student_bytes = 4 * num_parameters(build(folder / "large"))
    layer_bytes = 2 * start_bytes / 4  # one layer of the start, in float32 while it runs
    most = start_bytes + max(1.2 * student_bytes, layer_bytes) + SPARE_BYTES
    assert added_bytes(build, folder) < most


def test_a_lora_student_for_a_gpu_is_never_in_float32(folder: Path) -> None:
    def load(model: Path) -> object:
        recipe = plan_student(model, model, Student(init="lora"))
        return load_student(recipe, None, seed=0, frozen_dtype=torch.bfloat16)

    assert added_bytes(load, folder) < 1.2 * stored_bytes(folder / "large") + SPARE_BYTES


def test_the_merge_of_adapters_needs_no_second_copy_of_the_weights(
    folder: Path, tmp_path: Path
) -> None:
    for name in ("large", "tiny"):
        model = load_model(folder / name)
        add_lora(model, Lora(rank=4), seed=0)
        save_adapted(model, tmp_path / name, Lora(rank=4), dtype="float32")
        del model

    def merge(model: Path) -> None:
        merge_adapters(model, tmp_path / model.name, tmp_path / "merged" / model.name)

    # the pages of the start's files, and one tensor in float32
    assert added_bytes(merge, folder) < 1.2 * stored_bytes(folder / "large") + SPARE_BYTES
    assert stored_bytes(tmp_path / "merged" / "large") > 1.9 * stored_bytes(folder / "large")
