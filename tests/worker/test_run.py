import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import pytest

from tests.tiny import save_tiny
from worker.distill.progress import (
    CheckpointLine,
    ErrorLine,
    ResultLine,
    RunLine,
    StageLine,
    StoppedLine,
    run_line,
)
from worker.gguf import check_gguf
from worker.model_facts import model_facts

Json = dict[str, Any]  # Any: open-ended JSON


@pytest.fixture
def spec(tmp_path: Path, tiny_llama_dir: Path) -> Json:
    rows = [{"prompt": f"Who keeps house number {i}?", "completion": f"Student {i}."} for i in range(40)]
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
    command = [sys.executable, "-m", "worker.run", str(path), "--out", str(out)]
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
    assert lines[-1].facts == model_facts(tmp_path / "out" / lines[-1].folder).model_dump(mode="json")
    assert lines[-1].trained_tokens > 0
    assert all(
        (tmp_path / "out" / line.folder).parent.is_dir() for line in lines if isinstance(line, CheckpointLine)
    )


def test_sigterm_ends_in_a_checkpoint_from_which_the_run_goes_on(spec: Json, tmp_path: Path) -> None:
    spec["distillation"]["hyperparameters"] |= {"n_epochs": 1000, "eval_steps": 7, "checkpoint_steps": 7}
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
    resumed = start(spec | {"resume_dir": str(tmp_path / "out" / f"step-{stopped.step}")}, tmp_path / "again")
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


def test_a_student_that_cannot_be_exported_is_refused_before_the_work(spec: Json, tmp_path: Path) -> None:
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
