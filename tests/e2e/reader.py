"""Reader of a page: runs its code blocks as a user would, with one shell and one Python session."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.documentation import ROOT
from tests.e2e.service import Service

# Runs the code, and saves the variables that it has added. The variables of the shell itself must not
# be saved: one of them is the command.
SCRIPT = """set -eu; touch .state; . ./.state
reader_before=" $(compgen -v | tr '\\n' ' ') reader_before reader_name "
%s
for reader_name in $(compgen -v); do
  case $reader_before in *" $reader_name "*) ;; *) declare -p "$reader_name" >> .state ;; esac
done
"""


class Reader:
    """Runs code blocks in one folder. Later blocks see the variables of earlier ones.

    `changes` are replaced in each block: names of models, and sizes that a test has no time for.
    The URL of the pages becomes that of the running service.
    """

    def __init__(self, service: Service, folder: Path, changes: Mapping[str, str]) -> None:
        self.service, self.folder, self.changes = service, folder, changes
        self.names: dict[str, object] = {}
        self.environment: dict[str, str] = {}
        (folder / ".venv").symlink_to(sys.prefix)
        (folder / ".stillhouse").symlink_to(service.data_dir)

    def run(self, language: str, code: str) -> str:
        """Runs a block. Returns what a shell has printed."""
        assert language in ("sh", "python")
        for old, new in {"http://127.0.0.1:8400": self.service.url, **self.changes}.items():
            code = code.replace(old, new)
        if language == "sh":
            return self._shell(code)
        exec(compile(code, "page", "exec"), self.names)
        return ""

    def close(self) -> None:
        """Closes the client of the Python session."""
        if (client := self.names.get("client")) is not None:
            client.close()  # type: ignore[attr-defined]  # the pages name their OpenAI client so

    def _shell(self, code: str) -> str:
        done = subprocess.run(
            ["bash", "-c", SCRIPT % code],
            cwd=self.folder,
            env={
                **self.service.environment,
                "PYTHONPATH": str(ROOT),
                "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}",
                **self.environment,
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, (code, done.stdout, done.stderr)
        return done.stdout
