import json
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.tiny import save_tiny
from tests.worker.memory_sink import FaultAtStage, MemorySink
from worker.distill.students.recipe import load_model as load_plain
from worker.distill.training.checkpoint import load_state
from worker.models.gguf_reader import check_gguf
from worker.models.model_facts import model_facts
from worker.protocol.run_lines import (
    CheckpointLine,
    ErrorLine,
    ResultLine,
    RunLine,
    StageLine,
    StoppedLine,
    run_line,
)
from worker.protocol.run_spec import RunSpec
from worker.serve.loading import load_model
from worker.train import run

Json = dict[str, Any]  # Any: open-ended JSON


@pytest.fixture
def spec(tmp_path: Path, tiny_llama_dir: Path) -> Json:
    rows = [
        {"prompt": f"Who keeps house number {i}?", "completion": f"Student {i}."} for i in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return {
        "distillation": {
            "teacher": "tiny",
            "data": {"max_new_tokens": 8},
            "hyperparameters": {"n_epochs": 2, "batch_tokens": 256},
            "evaluation": {"num_samples": 1},
        },
        "teacher_dir": str(tiny_llama_dir),
        "start_dir": str(tiny_llama_dir),
        "training_path": str(tmp_path / "rows.jsonl"),
        "cache_dir": str(tmp_path / "cache"),
        "num_threads": 1,
    }


def start(spec: Json, out: Path) -> subprocess.Popen[str]:
    path = out.with_suffix(".json")
    path.write_text(json.dumps(spec))
    command = [sys.executable, "-m", "worker.train", str(path), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> list[RunLine]:
    """Everything on its output must be a line of the protocol."""
    output, errors = process.communicate(timeout=120)
    print(errors)
    return [run_line.validate_json(line) for line in output.splitlines()]


def read_until(output: IO[str], kind: type[RunLine]) -> list[RunLine]:
    lines: list[RunLine] = []
    for text in output:
        lines.append(run_line.validate_json(text))
        if isinstance(lines[-1], kind):
            break
    return lines


def test_a_run_says_lines_only_and_ends_with_its_result(spec: Json, tmp_path: Path) -> None:
    process = start(spec, tmp_path / "out")
    lines = finish(process)
    assert process.returncode == 0
    assert lines[0] == StageLine(name="loading_models")
    assert isinstance(lines[-1], ResultLine)
    assert lines[-1].facts == model_facts(tmp_path / "out" / lines[-1].folder).model_dump(
        mode="json"
    )
    assert lines[-1].trained_tokens > 0
    assert all(
        (tmp_path / "out" / line.folder).parent.is_dir()
        for line in lines
        if isinstance(line, CheckpointLine)
    )


def test_sigterm_ends_in_a_checkpoint_from_which_the_run_goes_on(
    spec: Json, tmp_path: Path
) -> None:
    spec["distillation"]["hyperparameters"] |= {
        "n_epochs": 1000,
        "eval_steps": 7,
        "checkpoint_steps": 7,
    }
    process = start(spec, tmp_path / "out")
    assert process.stdout is not None
    lines = read_until(process.stdout, CheckpointLine)
    process.send_signal(signal.SIGTERM)
    lines += finish(process)
    assert process.returncode == 0
    stopped = lines[-1]
    assert isinstance(stopped, StoppedLine)
    assert stopped.step >= 7
    spec["distillation"]["hyperparameters"]["max_steps"] = stopped.step + 2
    resumed = start(
        spec | {"resume_dir": str(tmp_path / "out" / f"step-{stopped.step}")}, tmp_path / "again"
    )
    lines = finish(resumed)
    assert isinstance(lines[-1], ResultLine)
    assert {line.step for line in lines if isinstance(line, CheckpointLine)} == {stopped.step + 2}


def test_what_trying_again_will_not_mend_is_an_error_line(spec: Json, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"nothing": 1}\n')
    process = start(spec, tmp_path / "out")
    lines = finish(process)
    assert process.returncode == 1
    assert isinstance(lines[-1], ErrorLine)
    assert lines[-1].code == "invalid_training_file"
    assert "line 2" in lines[-1].message


def test_the_student_is_exported_in_the_formats_asked_for(spec: Json, tmp_path: Path) -> None:
    spec["distillation"] |= {"export": ["gguf_f16", "gguf_q8_0"]}
    process = start(spec, tmp_path / "out")
    result = finish(process)[-1]
    assert isinstance(result, ResultLine)
    assert result.files == ("student-f16.gguf", "student-q8_0.gguf")
    sizes = [(tmp_path / "out" / name).stat().st_size for name in result.files]
    assert [made["bytes"] for made in result.result["exports"]] == sizes
    assert sizes[0] > 1.5 * sizes[1]
    for name in result.files:
        assert check_gguf(tmp_path / "out" / name).architecture == "llama"


def test_a_trimmed_student_is_the_best_checkpoint_with_fewer_tokens(
    spec: Json, tmp_path: Path, one_process: None
) -> None:
    spec["distillation"]["student"] = {"vocabulary": "rows"}
    sink = MemorySink()
    assert run(RunSpec.model_validate(spec), tmp_path / "out", sink, never) == 0
    found = result_of(sink)["vocabulary"]
    trimmed, whole = tmp_path / "out" / "student", tmp_path / "out" / "finished" / "0"
    assert found["num_tokens"] == model_facts(trimmed).vocab_size < found["num_tokens_before"]
    assert found["num_parameters"] == model_facts(trimmed).num_parameters
    assert found["num_parameters_before"] == model_facts(whole).num_parameters
    after, before = (AutoTokenizer.from_pretrained(folder) for folder in (trimmed, whole))
    kept = before.convert_tokens_to_ids(after.convert_ids_to_tokens(range(found["num_tokens"])))
    prompt = "Who keeps house number 3?"
    with torch.no_grad():
        logits = load_plain(trimmed)(torch.tensor([after(prompt).input_ids])).logits
        expected = load_plain(whole)(torch.tensor([before(prompt).input_ids])).logits
    torch.testing.assert_close(logits, expected[:, :, kept])


def test_a_student_that_cannot_be_exported_is_refused_before_the_work(
    spec: Json, tmp_path: Path
) -> None:
    spec["distillation"] |= {"export": ["gguf_f16"]}
    opt = str(save_tiny(tmp_path / "opt", "opt"))
    lines = finish(start(spec | {"teacher_dir": opt, "start_dir": opt}, tmp_path / "out"))
    assert [type(line) for line in lines] == [ErrorLine]
    assert isinstance(lines[0], ErrorLine)
    assert (lines[0].code, "'opt' cannot be exported" in lines[0].message) == (
        "unsupported_architecture",
        True,
    )


def test_a_crash_has_no_error_line(spec: Json, tmp_path: Path) -> None:
    process = start(spec | {"training_path": str(tmp_path / "gone.jsonl")}, tmp_path / "out")
    lines = finish(process)
    assert process.returncode not in (0, None)
    assert not [line for line in lines if isinstance(line, ErrorLine)]


@pytest.fixture
def one_process() -> Iterator[None]:
    """A run sets these for its process; the other tests of this one must not see it."""
    num_threads, is_deterministic = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
    )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(is_deterministic)


def result_of(sink: MemorySink) -> Json:
    (line,) = [line for line in sink.lines if isinstance(line, ResultLine)]
    return line.result


def run_with_fault(
    spec: Json, out: Path, stage: str, break_it: Callable[[], object]
) -> FaultAtStage:
    """Runs the spec in this process, with a fault that begins with a stage."""
    sink = FaultAtStage(stage, break_it)
    run(RunSpec.model_validate(spec), out, sink, lambda: False)
    return sink


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    "stage", ["loading_models", "generating_teacher_data", "training", "evaluating", "exporting"]
)
def test_a_full_disk_ends_every_stage_with_the_same_error(
    spec: Json, tmp_path: Path, stage: str
) -> None:
    questions = [{"prompt": f"Who keeps house number {i}?"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in questions))
    spec["distillation"]["export"] = ["gguf_f16"]
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk() -> None:  # the kernel refuses longer files as it does on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))

    sink = run_with_fault(spec, tmp_path / "out", stage, fill_disk)
    (error,) = [line for line in sink.lines if isinstance(line, ErrorLine)]
    assert (error.code, sink.lines[-1]) == ("disk_full", error)
    assert "free some disk" in error.message
    assert not [line for line in sink.lines if isinstance(line, ResultLine)]


@pytest.mark.usefixtures("one_process")
def test_a_failed_evaluation_leaves_the_student_and_the_result_names_what_is_missing(
    spec: Json, tmp_path: Path, tiny_llama_dir: Path
) -> None:
    teacher = shutil.copytree(tiny_llama_dir, tmp_path / "teacher")
    spec |= {"teacher_dir": str(teacher), "start_dir": str(teacher)}

    def damage_teacher() -> None:
        (teacher / "model.safetensors").write_bytes(b"damaged")

    sink = run_with_fault(spec, tmp_path / "out", "evaluating", damage_teacher)
    (missing,) = result_of(sink)["missing"]
    assert (missing["part"], missing["code"]) == ("evaluation", "evaluation_failed")
    assert result_of(sink)["num_steps"] > 0
    (warning,) = [line for line in sink.warnings if line.data.get("part") == "evaluation"]
    assert "the student is registered without" in warning.message
    assert load_model(tmp_path / "out" / "student").num_bytes > 0


@pytest.mark.usefixtures("one_process")
def test_a_failed_evaluation_is_not_presented_as_one_on_the_test_rows(
    spec: Json, tmp_path: Path, tiny_llama_dir: Path
) -> None:
    teacher = shutil.copytree(tiny_llama_dir, tmp_path / "teacher")
    test_path = tmp_path / "test.jsonl"
    test_path.write_text('{"prompt": "What is a test?", "completion": "A jar."}\n')
    spec |= {"teacher_dir": str(teacher), "start_dir": str(teacher), "test_path": str(test_path)}
    spec["distillation"]["evaluation"]["test_file"] = "file-1"

    def damage_teacher() -> None:
        (teacher / "model.safetensors").write_bytes(b"damaged")

    result = result_of(run_with_fault(spec, tmp_path / "out", "evaluating", damage_teacher))
    assert [entry["part"] for entry in result["missing"]] == ["evaluation"]
    assert (result["judged_on"], result["is_chosen_on_judged_rows"]) == ("validation", True)


@pytest.mark.usefixtures("one_process")
def test_a_gate_is_not_passed_without_an_evaluation(
    spec: Json, tmp_path: Path, tiny_llama_dir: Path
) -> None:
    teacher = shutil.copytree(tiny_llama_dir, tmp_path / "teacher")
    spec |= {"teacher_dir": str(teacher), "start_dir": str(teacher)}
    spec["distillation"]["evaluation"]["gate"] = {"metric": "kl", "at_most": 1e9}
    weights = (teacher / "model.safetensors").read_bytes()

    def damage_teacher() -> None:
        (teacher / "model.safetensors").write_bytes(b"damaged")

    sink = run_with_fault(spec, tmp_path / "out", "evaluating", damage_teacher)
    error = sink.lines[-1]
    assert isinstance(error, ErrorLine)
    assert error.code == "evaluation_failed"
    assert "resume the job" in error.message
    assert any("counts as not passed" in warning.message for warning in sink.warnings)
    (teacher / "model.safetensors").write_bytes(weights)  # the cause is gone: the job is resumed
    newest = max((tmp_path / "out").glob("step-*"), key=lambda folder: load_state(folder).job_step)
    again = MemorySink()
    assert (
        run(RunSpec.model_validate(spec | {"resume_dir": newest}), tmp_path / "again", again, never)
        == 0
    )
    assert isinstance(again.lines[-1], ResultLine)
    assert again.lines[-1].result["student"]["kl"] > 0


@pytest.mark.usefixtures("one_process")
def test_a_failed_export_leaves_the_student_and_the_other_exports(
    spec: Json, tmp_path: Path
) -> None:
    spec["distillation"]["export"] = ["gguf_f16", "gguf_q8_0"]
    sink = run_with_fault(
        spec, tmp_path / "out", "exporting", lambda: (tmp_path / "out" / "student-f16.gguf").mkdir()
    )
    (missing,) = result_of(sink)["missing"]
    assert (missing["part"], missing["code"]) == ("gguf_f16", "export_failed")
    assert [made["format"] for made in result_of(sink)["exports"]] == ["gguf_q8_0"]
    assert isinstance(sink.lines[-1], ResultLine)
    assert sink.lines[-1].files == ("student-q8_0.gguf",)
    assert [line.data.get("part") for line in sink.warnings] == ["gguf_f16"]


def never() -> bool:
    return False
