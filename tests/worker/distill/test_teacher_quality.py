"""Jobs with a quantised teacher: its caches, its figures and what the job says about them."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import save_tiny
from tests.worker.memory_sink import MemorySink
from worker.distill import teacher_quality
from worker.distill.data.rows import Example
from worker.distill.losses.lm_head import Head
from worker.distill.pipeline import distil
from worker.distill.students.recipe import load_model
from worker.distill.teacher_quality import MOST_TOKENS, NUM_ROWS, compare, some_rows
from worker.distill.teachers.quantized import load_quantized
from worker.errors import UnsupportedPrecision
from worker.protocol.run_lines import MessageLine
from worker.protocol.run_spec import RunSpec
from worker.train import EngineSampler

MakeSpec = Callable[..., RunSpec]
Json = dict[str, Any]  # Any: the public result
Run = Callable[..., tuple[MemorySink, Json]]
needs_torchao = pytest.mark.skipif(
    find_spec("torchao") is None, reason='needs torchao: pip install -e ".[quantized]"'
)
INT8 = {"teacher_precision": "int8"}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A function that runs a spec and returns its lines and its result."""

    def run_it(spec: RunSpec, out: str = "out") -> tuple[MemorySink, Json]:
        sink = MemorySink()
        outcome = distil(spec, tmp_path / out, sink, EngineSampler, lambda: False)
        return sink, outcome.result

    return run_it


def reports(sink: MemorySink) -> list[str]:
    """The events about the quality of the teacher."""
    messages = [line.message for line in sink.lines if isinstance(line, MessageLine)]
    return [message for message in messages if message.startswith("teacher in ")]


def test_the_comparison_is_that_of_all_logits() -> None:
    torch.manual_seed(0)
    weight_VH, bias_V = torch.randn(50, 8), torch.randn(50)
    head = Head(weight_VH, bias_V)
    full_NH = torch.randn(200, 8)
    other_NH = full_NH + 0.1 * torch.randn(200, 8)
    p_NV, q_NV = (
        (hidden_NH.double() @ weight_VH.double().t() + bias_V).log_softmax(-1)
        for hidden_NH in (full_NH, other_NH)
    )
    kl, agreement = compare(full_NH, other_NH, head)
    assert kl == pytest.approx(float((p_NV.exp() * (p_NV - q_NV)).sum(-1).mean()), rel=1e-4)
    assert agreement == float((p_NV.argmax(-1) == q_NV.argmax(-1)).double().mean())
    assert compare(full_NH, full_NH, head) == (0.0, 1.0)


def test_the_measured_rows_are_bounded() -> None:
    short, long = (Example(tuple(range(n)), ((1, n),)) for n in (8, MOST_TOKENS // 2))
    assert len(some_rows([short] * 100)) == NUM_ROWS
    assert len(some_rows([long] * 3)) == 2
    assert some_rows([]) == []


@needs_torchao
def test_a_job_reports_what_its_teacher_has_lost(
    run: Run, make_spec: MakeSpec, tiny_llama_dir: Path
) -> None:
    sink, result = run(make_spec(INT8, n_epochs=1))
    found = result["teacher_quality"]
    assert found["precision"] == "int8"
    assert 0 < found["kl"] < 0.1
    assert 0.9 < found["agreement"] <= 1
    (report,) = reports(sink)
    assert f"{found['num_tokens']:,} tokens in {found['num_rows']} held-out rows" in report
    teacher = result["teacher"]
    small = load_quantized(tiny_llama_dir, "int8", device="cpu", dtype=torch.float32)
    assert teacher["num_parameters"] == sum(p.numel() for p in small.parameters())
    assert teacher["weights_bytes"] < 4 * teacher["num_parameters"]
    assert teacher["kl"] < 1e-4  # the rows of the cache are those of the quantised teacher


@needs_torchao
def test_int4_loses_more_than_int8(run: Run, make_spec: MakeSpec) -> None:
    lost = [
        run(make_spec({"teacher_precision": precision}, n_epochs=1), precision)[1][
            "teacher_quality"
        ]["kl"]
        for precision in ("int8", "int4")
    ]
    assert lost[0] < lost[1]


@needs_torchao
def test_rows_and_answers_of_a_quantised_teacher_have_caches_of_their_own(
    run: Run, make_spec: MakeSpec
) -> None:
    answering = {"data": {"max_new_tokens": 4, "completions": "teacher"}}
    plain = make_spec(answering, n_epochs=1)
    run(plain)
    caches = [set((plain.cache_dir / name).iterdir()) for name in ("answers", "teacher")]
    run(make_spec({**answering, **INT8}, n_epochs=1), "second")
    for name, before in zip(("answers", "teacher"), caches, strict=True):
        after = set((plain.cache_dir / name).iterdir())
        assert before < after


@needs_torchao
def test_a_full_teacher_that_does_not_fit_is_not_measured(
    run: Run, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_quality, "SPARE_BYTES", 2**60)
    sink, result = run(make_spec(INT8, n_epochs=1))
    found = result["teacher_quality"]
    assert set(found) == {"precision", "not_measured"}
    (report,) = reports(sink)
    assert "was not measured, because the full teacher needs" in report


@needs_torchao
def test_a_resumed_job_keeps_its_figures(run: Run, make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec(INT8, checkpoint_steps=2)
    _, first = run(spec)
    oldest = min((tmp_path / "out").glob("step-*"), key=lambda path: int(path.name[5:]))
    sink, second = run(spec.model_copy(update={"resume_dir": oldest}), "second")
    assert reports(sink) == []
    assert second["teacher_quality"] == first["teacher_quality"]
    assert second["student"]["kl"] == first["student"]["kl"]


@needs_torchao
@pytest.mark.parametrize("family", ["t5", "bert", "qwen3"])
def test_teachers_of_every_kind_can_be_quantised(
    run: Run, make_spec: MakeSpec, tmp_path: Path, family: str
) -> None:
    folder = save_tiny(tmp_path / family, family)
    fresh = {"init": "fresh", "config": {"family": "encoder-decoder", "hidden_size": 32}}
    student = fresh if family == "bert" else {}
    spec = make_spec(
        {**INT8, "student": student},
        spec={"teacher_dir": folder, "start_dir": folder},
        n_epochs=1,
        max_steps=2,
    )
    _, result = run(spec)
    assert result["teacher_quality"]["kl"] > 0


@needs_torchao
def test_feature_losses_read_a_quantised_teacher(run: Run, make_spec: MakeSpec) -> None:
    objective = {"hidden": {"kind": "mse"}, "attention": {"weight": 0.5}}
    _, result = run(make_spec({**INT8, "objective": objective}, max_steps=2))
    assert result["teacher_quality"]["kl"] > 0


def test_a_job_without_the_option_reports_nothing(run: Run, make_spec: MakeSpec) -> None:
    sink, result = run(make_spec(n_epochs=1, max_steps=2))
    assert "teacher_quality" not in result
    assert reports(sink) == []


def test_a_precision_that_the_device_lacks_is_a_permanent_failure(
    run: Run, make_spec: MakeSpec
) -> None:
    with pytest.raises(UnsupportedPrecision, match="cannot be quantised to fp8"):
        run(make_spec({"teacher_precision": "fp8"}))


def test_free_memory_is_less_than_the_memory_of_the_machine() -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemTotal:"))
    assert 0 < teacher_quality.free_memory_bytes() < total


@needs_torchao
def test_layers_without_a_quantised_weight_are_still_packed(tiny_llama_dir: Path) -> None:
    from worker.cpu import prepare_for_inference
    from worker.cpu.linear_ops import packed_weight

    small = load_quantized(tiny_llama_dir, "int8", device="cpu", dtype=torch.float32)
    tokens = torch.tensor([[5, 9, 40]])
    before = small(input_ids=tokens).logits
    prepare_for_inference(small, exact=small.get_output_embeddings())
    assert packed_weight(small.get_output_embeddings()) is not None
    assert packed_weight(small.model.layers[0].mlp.down_proj) is None
    torch.testing.assert_close(small(input_ids=tokens).logits, before, rtol=1e-4, atol=1e-4)
    assert load_model(tiny_llama_dir).config.vocab_size == small.config.vocab_size
