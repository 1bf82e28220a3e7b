"""Quantised teachers on a card, in each precision that it has."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from app.contracts.distillation import TeacherPrecision
from app.contracts.train_workers import supported_precisions
from tests.worker.memory_sink import MemorySink
from worker.distill.pipeline import distil
from worker.distill.students.recipe import load_model
from worker.distill.teachers.quantized import load_quantized
from worker.protocol.run_spec import RunSpec
from worker.train import EngineSampler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        find_spec("torchao") is None, reason='needs torchao: pip install -e ".[quantized]"'
    ),
]
PRECISIONS: list[TeacherPrecision] = ["int8", "int4", "fp8"]
MOST_KL = {"int8": 0.05, "int4": 1.0, "fp8": 0.5}  # of a tiny model with wide random weights


@pytest.fixture(params=PRECISIONS)
def precision(request: pytest.FixtureRequest) -> TeacherPrecision:
    name: TeacherPrecision = request.param
    capability = torch.cuda.get_device_capability()
    if name not in supported_precisions(has_package=True, capability=capability):
        pytest.skip(f"{name} needs a newer card")
    return name


@torch.no_grad()
def test_a_quantised_model_is_close_to_the_full_one(
    tiny_llama_dir: Path, precision: TeacherPrecision
) -> None:
    tokens = torch.tensor([[5, 9, 40, 77, 98, 21, 13, 61]], device="cuda")
    full = load_model(tiny_llama_dir, torch.bfloat16).to("cuda")
    small = load_quantized(tiny_llama_dir, precision, device="cuda", dtype=torch.bfloat16)
    assert {parameter.device.type for parameter in small.parameters()} == {"cuda"}
    log_p, log_q = (model(tokens).logits.float().log_softmax(-1) for model in (full, small))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert 0 < float(kl) < MOST_KL[precision]


def test_a_job_with_a_quantised_teacher_runs_to_its_end(
    make_spec: Callable[..., RunSpec], tmp_path: Path, precision: TeacherPrecision
) -> None:
    spec = make_spec({"teacher_precision": precision})
    result = distil(spec, tmp_path / "out", MemorySink(), EngineSampler, lambda: False).result
    assert 0 < result["teacher_quality"]["kl"] < MOST_KL[precision]
    assert result["teacher_quality"]["full_dtype"] == "bfloat16"
