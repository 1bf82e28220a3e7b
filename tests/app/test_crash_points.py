"""A crash point does nothing unless it is armed, and ends one process when it is."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from app import crash_points
from tests.serve_worker import ROOT

PASS = "import sys; from app import crash_points; crash_points.arm(sys.argv[1]); crash_points.crash_point('here'); print('passed')"


def run(folder: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PASS, folder], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_nothing_happens_without_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").touch()
    monkeypatch.chdir(tmp_path)
    crash_points.arm("")
    crash_points.crash_point("here")
    assert (tmp_path / "here").exists()


def test_an_armed_point_ends_the_first_process_that_passes_and_no_other(tmp_path: Path) -> None:
    assert run(str(tmp_path)).stdout == "passed\n"
    (tmp_path / "here").touch()
    assert run(str(tmp_path)).returncode == -signal.SIGKILL
    assert run(str(tmp_path)).stdout == "passed\n"


def test_the_file_may_name_another_signal(tmp_path: Path) -> None:
    (tmp_path / "here").write_text("TERM")
    assert run(str(tmp_path)).returncode == -signal.SIGTERM
